"""The exchange in rounds: each brings a rank an equal part of the rows that it waits for.

One document of 12 tokens on three ranks of 4, in two rounds; rank 2 waits for 8 rows:

    own       rank 1: 4-7 see 4-7       rank 2: 8-11 see 8-11
    round 1   rank 1: 4-7 see 0-1       rank 2: 8-11 see 4-7     (from the rank before, as in a ring)
    round 2   rank 1: 4-7 see 2-3       rank 2: 8-11 see 0-3

Ranks set out on a round together. So rows are spread over all rounds: a rank whose work lay in the first ones
would keep others waiting that have as much in all.

In the own round a waiting piece sees those of its document's rows that its rank holds, up to itself. In every
further round it sees all rows of its document that have arrived; they lie before it. Each round is a `Plan`
of its own over the same rows, with the keys, transfers and borders of that round alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.plan import Plan, Round, borders, make_plan, ranges

__all__ = ["make_rounds"]


@dataclass(frozen=True)
class _Arrivals:
    """Rows on their way to one rank, by round and source: micro-batch tokens, their sources and rounds."""

    tokens: np.ndarray
    source: np.ndarray
    number: np.ndarray


def make_rounds(placement: Placement, rank: int, *, rounds: int) -> list[Round]:
    """The own round of `rank`, and `rounds` further ones.

    A function of the placement and `rounds` alone, so that all ranks' rounds fit together.
    """
    ranks = placement.context_parallel_size
    plans = [make_plan(placement, other) for other in range(ranks)]
    arrivals = [_arrivals(plans, other, rounds) for other in range(ranks)]
    whole = plans[rank]
    own = whole.token_index
    made_rounds = [_round(placement, whole, own, np.arange(own.size), up_to_itself=True)]
    for number in range(1, rounds + 1):
        mine = arrivals[rank].number == number
        arriving = arrivals[rank].tokens[mine]
        made = _round(placement, whole, arriving, own.size + np.arange(arriving.size), up_to_itself=False)
        sent = [one.tokens[(one.number == number) & (one.source == rank)] for one in arrivals]
        row_of = np.full(int(placement.cu_seqlens[-1]), -1, dtype=np.int64)
        row_of[own] = np.arange(own.size)
        transfers = dataclasses.replace(
            made.plan,
            send_index=row_of[np.concatenate(sent)].astype(np.int32),
            send_counts=tuple(one.size for one in sent),
            recv_counts=tuple(np.bincount(arrivals[rank].source[mine], minlength=ranks).tolist()),
        )
        made_rounds.append(Round(transfers, made.query_index))
    return made_rounds


def _arrivals(plans: list[Plan], rank: int, rounds: int) -> _Arrivals:
    """What `rank` receives: the nearest rank before it first, as keys close to a query matter to most of its
    pieces, and spread evenly over the rounds.
    """
    tokens, source = [], []
    for step in range(1, len(plans)):
        other = (rank - step) % len(plans)
        plan = plans[other]
        begin = sum(plan.send_counts[:rank])
        sent = plan.token_index[plan.send_index[begin : begin + plan.send_counts[rank]]]
        tokens.append(sent)
        source.append(np.full(sent.size, other))
    empty = [np.zeros(0, dtype=np.int64)]
    joined, sources = np.concatenate(tokens or empty), np.concatenate(source or empty)
    number = 1 + np.arange(joined.size) * rounds // max(1, joined.size)
    order = np.lexsort((sources, number))  # an all-to-all delivers by source
    return _Arrivals(joined[order], sources[order], number[order])


def _round(
    placement: Placement, whole: Plan, tokens: np.ndarray, key_rows: np.ndarray, *, up_to_itself: bool
) -> Round:
    """The waiting pieces' view of `tokens`, which lie at `key_rows`; without transfers."""
    order = np.argsort(tokens)
    sorted_tokens, sorted_rows = tokens[order], key_rows[order]
    starts = whole.local_tokens + whole.cu_seqlens_q[:-1].astype(np.int64)
    lengths = np.diff(whole.cu_seqlens_q).astype(np.int64)
    first_query = whole.token_index[starts]
    document = np.searchsorted(placement.cu_seqlens, first_query, side="right") - 1
    stop = first_query + lengths if up_to_itself else first_query
    begin_key = np.searchsorted(sorted_tokens, placement.cu_seqlens[document])
    end_key = np.searchsorted(sorted_tokens, stop)
    sees = end_key > begin_key
    begin_key, end_key, lengths = begin_key[sees], end_key[sees], lengths[sees]
    keys = end_key - begin_key
    begin_query = starts[sees] - whole.local_tokens
    plan = dataclasses.replace(
        whole,
        local_tokens=whole.token_index.size,  # gradients are added to every row's
        cu_seqlens_q=borders(lengths),
        cu_seqlens_k=borders(keys),
        key_index=sorted_rows[ranges(begin_key, end_key)].astype(np.int32),
        send_index=np.zeros(0, dtype=np.int32),
        send_counts=(0,) * placement.context_parallel_size,
        recv_counts=(0,) * placement.context_parallel_size,
        max_seqlen_q=int(lengths.max(initial=0)),
        max_seqlen_k=int(keys.max(initial=0)),
    )
    return Round(plan, ranges(begin_query, begin_query + lengths))
