"""The plan of one rank: what it holds, in which order, what it waits for, whom it serves.

One document of 8 tokens on two ranks, zigzag; rank 0 holds tokens 0-1 and 6-7, rank 1 tokens 2-5:

    rank 0   holds 0 1 | 6 7     local: 0-1 see only themselves   waiting: 6-7 need 0-7, so receive 2 3 4 5
    rank 1   holds     | 2 3 4 5                                  waiting: 2-5 need 0-5, so receive 0 1

A *local* piece begins its document, so that its keys are exactly its own rows; every other piece is
*waiting*. Local rows come first, and each group is in token order: both outputs are slices. A key is fetched
once a rank, also where two pieces of the rank need it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.placement import Placement, piece_areas

__all__ = ["Plan", "Relay", "Round", "Whole", "borders", "check_plans", "make_plan", "make_plans", "ranges"]


@dataclass(frozen=True)
class Plan:
    """What one rank does with a micro-batch; T tokens held, L local pieces, W waiting ones, R received rows.

    token_index       int64 [T]    micro-batch token of every row
    local_tokens                   rows [0, local_tokens) are the local pieces
    cu_seqlens_local  int32 [L+1]  their borders, as queries and as keys
    cu_seqlens_q      int32 [W+1]  waiting pieces' queries, counted from row local_tokens
    cu_seqlens_k      int32 [W+1]  their keys: of each piece, from its document's first token to its own last
    key_index         int32 [K]    row, among own rows and then received ones, of every such key
    send_index        int32 [S]    own rows to send, by destination rank, in token order within
    send_counts, recv_counts       rows to and from every rank; received ones lie by source, in token order
    max_seqlen_local, _q, _k       longest local piece; longest query and key run of a waiting one; 0: none
    area                           visible (query, key) pairs
    rounds                         of exchange ring (`rounds.py`); none for the others
    whole                          of exchange ulysses (`heads.py`); None for the others
    relay                          of exchange sparse in two levels (`relay.py`): the second all-to-all, whose
                                   rows lie behind those of the first; None: there is one
    head_parts                     of exchange sparse: parts of the heads that travel one after another,
                                   forward and backward (`overlap.py`)
    """

    token_index: np.ndarray
    local_tokens: int
    cu_seqlens_local: np.ndarray
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray
    key_index: np.ndarray
    send_index: np.ndarray
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    max_seqlen_local: int
    max_seqlen_q: int
    max_seqlen_k: int
    area: int
    rounds: tuple[Round, ...] = ()
    whole: Whole | None = None
    relay: Relay | None = None
    head_parts: tuple[int, int] = (1, 1)

    @property
    def received_tokens(self) -> int:
        """Rows that reach this rank, those that it merely hands on too."""
        return sum(self.recv_counts) + (sum(self.relay.recv_counts) if self.relay is not None else 0)


@dataclass(frozen=True)
class Relay:
    """The second all-to-all of the two-level exchange, inside a node.

    send_index  int32 [S]     rows to send, own ones or, behind those, received in the first, by destination
                              rank, in token order within
    send_counts, recv_counts  as in `Plan`
    """

    send_index: np.ndarray
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """One round of one rank.

    plan          keys, borders and transfers of this round; its pieces are the waiting ones that see a key in
                  it
    query_index   int64 [Q]  rows of those pieces, counted from the first waiting row
    """

    plan: Plan
    query_index: np.ndarray


@dataclass(frozen=True)
class Whole:
    """All S tokens of a micro-batch, for one rank.

    cu_seqlens  int32 [D+1]  borders of the documents
    to_tokens   int64 [S]    where each token lies among all ranks' rows, laid end to end, this rank's last
    to_rows     int64 [S]    the token of each such row
    """

    cu_seqlens: np.ndarray
    to_tokens: np.ndarray
    to_rows: np.ndarray

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.cu_seqlens).max(initial=0))


def make_plans(placement: Placement) -> list[Plan]:
    """The plans of all ranks."""
    return [make_plan(placement, rank) for rank in range(placement.context_parallel_size)]


def make_plan(placement: Placement, rank: int) -> Plan:
    """The plan of `rank`. A function of the placement alone, so that all ranks' plans fit together."""
    mine = np.flatnonzero(placement.rank == rank)
    first, lengths = placement.cu_seqlens[placement.document], placement.stop - placement.start
    is_local = placement.start[mine] == first[mine]
    local, waiting = mine[is_local], mine[~is_local]
    own = np.concatenate([local, waiting])
    received = _needed(placement, waiting)
    received = received[placement.rank[received] != rank]
    received = received[np.argsort(placement.rank[received], kind="stable")]
    row_of = np.full(placement.rank.size, -1, dtype=np.int64)  # the first row of every piece that is at hand
    at_hand = np.concatenate([own, received])
    row_of[at_hand] = np.cumsum(lengths[at_hand]) - lengths[at_hand]
    # a waiting piece's keys are its document's pieces up to itself
    keys = ranges(np.searchsorted(placement.document, placement.document[waiting]), waiting + 1)
    send_index, send_counts = _sends(placement, rank, row_of)
    recv_counts = np.bincount(
        placement.rank[received], weights=lengths[received], minlength=placement.context_parallel_size
    )
    q_lengths, k_lengths = lengths[waiting], placement.stop[waiting] - first[waiting]
    return Plan(
        token_index=ranges(placement.start[own], placement.stop[own]),
        local_tokens=int(lengths[local].sum()),
        cu_seqlens_local=borders(lengths[local]),
        cu_seqlens_q=borders(q_lengths),
        cu_seqlens_k=borders(k_lengths),
        key_index=ranges(row_of[keys], row_of[keys] + lengths[keys]).astype(np.int32),
        send_index=send_index,
        send_counts=send_counts,
        recv_counts=tuple(recv_counts.astype(int).tolist()),
        max_seqlen_local=int(lengths[local].max(initial=0)),
        max_seqlen_q=int(q_lengths.max(initial=0)),
        max_seqlen_k=int(k_lengths.max(initial=0)),
        area=int(piece_areas(placement)[mine].sum()),
    )


def _needed(placement: Placement, waiting: np.ndarray) -> np.ndarray:
    """Pieces, in token order, that lie before the last of these waiting pieces in the same document."""
    last = np.full(placement.cu_seqlens.size - 1, -1, dtype=np.int64)
    np.maximum.at(last, placement.document[waiting], waiting)
    return np.flatnonzero(np.arange(placement.rank.size) < last[placement.document])


def _sends(placement: Placement, rank: int, row_of: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Own rows by destination: each of this rank's pieces goes to every rank with a later piece of its
    document.
    """
    ranks, documents = placement.context_parallel_size, placement.cu_seqlens.size - 1
    split = np.unique(placement.document[placement.start != placement.cu_seqlens[placement.document]])
    compact = np.full(documents, -1)
    compact[split] = np.arange(split.size)
    pieces = np.flatnonzero(compact[placement.document] >= 0)
    last = np.full((ranks, split.size), -1, dtype=np.int64)
    np.maximum.at(last, (placement.rank[pieces], compact[placement.document[pieces]]), pieces)
    mine = pieces[placement.rank[pieces] == rank]
    wanted = last[:, compact[placement.document[mine]]] > mine[None, :]
    wanted[rank] = False
    destination, which = np.nonzero(wanted)
    sent = mine[which]
    lengths = placement.stop[sent] - placement.start[sent]
    counts = np.bincount(destination, weights=lengths, minlength=ranks).astype(int)
    rows = ranges(row_of[sent], row_of[sent] + lengths)
    return rows.astype(np.int32), tuple(counts.tolist())


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """The integers of every [start, stop), one range after another."""
    lengths = stop - start
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(start - offsets, lengths) + np.arange(int(lengths.sum()))


def borders(lengths: np.ndarray) -> np.ndarray:
    """int32 [n+1] borders of n runs of these lengths, laid end to end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def check_plans(placement: Placement, plans: list[Plan]) -> None:
    """AssertionError where tokens, transfers or visible pairs are not each accounted for exactly once."""
    tokens = int(placement.cu_seqlens[-1])
    owned = np.concatenate([plan.token_index for plan in plans])
    assert np.array_equal(np.sort(owned), np.arange(tokens)), "a token is not owned exactly once"
    assert len({plan.token_index.size for plan in plans}) == 1, "ranks hold different numbers of tokens"
    lengths = np.diff(placement.cu_seqlens)
    pairs = int((lengths * (lengths + 1) // 2).sum())
    assert sum(plan.area for plan in plans) == pairs, "visible pairs are not each computed once"
    first_of = np.repeat(placement.cu_seqlens[:-1], lengths)
    for rank, plan in enumerate(plans):
        held = np.concatenate([plan.token_index, _arriving(plans, rank)])
        assert held.size == plan.token_index.size + sum(plan.recv_counts), (
            f"rank {rank}: sent is not received"
        )
        keys = held[plan.key_index]
        for piece in range(plan.cu_seqlens_q.size - 1):
            rows = slice(*(plan.local_tokens + plan.cu_seqlens_q[piece : piece + 2]))
            queries = plan.token_index[rows]
            seen = keys[slice(*plan.cu_seqlens_k[piece : piece + 2])]
            expected = np.arange(first_of[queries[0]], queries[-1] + 1)
            assert np.array_equal(seen, expected), (
                f"rank {rank}: a waiting piece does not see its document's keys"
            )
            assert np.array_equal(queries, expected[-queries.size :]), (
                f"rank {rank}: a piece is not contiguous"
            )
        for piece in range(plan.cu_seqlens_local.size - 1):
            row, end = plan.cu_seqlens_local[piece : piece + 2]
            first = plan.token_index[row]
            whole = np.array_equal(plan.token_index[row:end], np.arange(first, first + end - row))
            assert whole and first == first_of[first], (
                f"rank {rank}: a local piece does not begin its document"
            )
        used = np.unique(plan.key_index[plan.key_index >= plan.token_index.size]).size
        assert used == sum(plan.recv_counts), f"rank {rank}: a received row is not needed"


def _arriving(plans: list[Plan], rank: int) -> np.ndarray:
    """Tokens in the order in which `rank` receives them."""
    parts = []
    for source, plan in enumerate(plans):
        begin = sum(plan.send_counts[:rank])
        rows = plan.send_index[begin : begin + plan.send_counts[rank]]
        assert rows.size == plans[rank].recv_counts[source], f"rank {source} to {rank}: sent is not received"
        parts.append(plan.token_index[rows])
    return np.concatenate(parts)
