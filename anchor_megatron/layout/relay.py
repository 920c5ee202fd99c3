"""The two-level form of the exchange: a row crosses to a group of ranks once, and is handed on inside it.

One document of 8 tokens on four ranks, groups of two; ranks 2 and 3 both need tokens 0-3 of the other group:

    rank       0            1            2                3
    holds      0 1          2 3          4 5              6 7
    between    0 1 to 2     2 3 to 3                                  4 rows cross; in one level 8
    inside     0 1 to 1                  0 1 4 5 to 3     2 3 to 2

*Between*: of all rows that a group needs from others, in order of source and token, each of its ranks takes
an equal share, so that the work is level over their links. *Inside*: every rank passes its own rows and its
share to those of its group that need them. Either step is one all-to-all over all ranks, most of whose parts
are empty.

On several nodes the groups are the nodes: fewer rows take the slow way between them. On one node they are
neighbours, as many as suit: whoever holds the early tokens of a long document, which all its ranks need,
sends them to every group instead of every rank, and the others send them on.

Whether two steps are taken, and by which groups, `overlap.py` says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.plan import Plan, Relay, make_plan, ranges
from anchor_megatron.layout.traffic import Traffic

__all__ = ["Hops", "group_sizes", "hops", "make_relay", "wire_seconds"]


@dataclass(frozen=True)
class _Runs:
    """Runs of tokens, int64 [N] each: the piece they are of, [start, stop), and the ranks they go from and
    to.
    """

    piece: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    source: np.ndarray
    to: np.ndarray

    def pick(self, which: np.ndarray) -> _Runs:
        """Those of a mask or an index, in its order."""
        return _Runs(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    def sent(self, ranks: int) -> np.ndarray:
        """Rows int64 [ranks] that leave every rank."""
        return self._rows(self.source, ranks)

    def received(self, ranks: int) -> np.ndarray:
        """Rows int64 [ranks] that reach every rank."""
        return self._rows(self.to, ranks)

    def _rows(self, rank: np.ndarray, ranks: int) -> np.ndarray:
        return np.bincount(rank, weights=self.stop - self.start, minlength=ranks).astype(np.int64)


@dataclass(frozen=True)
class Hops:
    """Who hands which tokens to whom, of all ranks, in the two steps."""

    between: _Runs
    inside: _Runs

    def sent(self, ranks: int) -> np.ndarray:
        """Rows int64 [ranks] that leave every rank, those that it hands on too."""
        return self.between.sent(ranks) + self.inside.sent(ranks)

    def received(self, ranks: int) -> np.ndarray:
        """Rows int64 [ranks] that reach every rank, those that it merely hands on too."""
        return self.between.received(ranks) + self.inside.received(ranks)


def hops(placement: Placement, size: int) -> Hops:
    """The two steps for groups of so many neighbouring ranks."""
    split = placement.start != placement.cu_seqlens[placement.document]
    documents = np.unique(placement.document[split])
    pieces = np.flatnonzero(np.isin(placement.document, documents))
    document = np.searchsorted(documents, placement.document[pieces])
    # the last piece of every (rank, document): a rank needs those before it that it does not hold
    last = np.full((placement.context_parallel_size, documents.size), -1, dtype=np.int64)
    np.maximum.at(last, (placement.rank[pieces], document), pieces)
    between = _between(placement, pieces, document, last, size)
    return Hops(between, _inside(placement, pieces, documents, last, between, size))


def _between(
    placement: Placement, pieces: np.ndarray, document: np.ndarray, last: np.ndarray, near: int
) -> _Runs:
    """Every row that a group needs and does not hold, to one of its ranks; by group, source and token."""
    holder = placement.rank[pieces]
    group_last = last.reshape(last.shape[0] // near, near, last.shape[1]).max(axis=1)
    needs = group_last[:, document] > pieces[None, :]
    needs[holder // near, np.arange(pieces.size)] = False
    order = np.argsort(holder, kind="stable")
    group, which = np.nonzero(needs[:, order])
    piece = pieces[order[which]]
    # all groups' rows end to end; those of a group are cut into a share for each of its ranks
    rows = placement.stop[piece] - placement.start[piece]
    ends = np.cumsum(rows)
    total = np.bincount(group, weights=rows, minlength=group_last.shape[0]).astype(np.int64)
    shares = (np.cumsum(total) - total)[:, None] + total[:, None] * np.arange(1, near + 1) // near
    cuts = np.union1d(ends, shares[shares > 0])
    begins = np.concatenate([[0], cuts])[:-1]
    of = np.searchsorted(ends, cuts)
    token = placement.stop[piece[of]] - ends[of]  # of the row at 0, were the piece's run to reach there
    taker = np.searchsorted(shares.reshape(-1), cuts)
    return _Runs(piece[of], token + begins, token + cuts, placement.rank[piece[of]], taker)


def _inside(
    placement: Placement,
    pieces: np.ndarray,
    documents: np.ndarray,
    last: np.ndarray,
    between: _Runs,
    near: int,
) -> _Runs:
    """Own rows and those of the first step, from who has them to every other rank of the group that needs
    them; by source, receiver and token.
    """
    piece = np.concatenate([pieces, between.piece])
    start = np.concatenate([placement.start[pieces], between.start])
    stop = np.concatenate([placement.stop[pieces], between.stop])
    source = np.concatenate([placement.rank[pieces], between.to])
    document = np.searchsorted(documents, placement.document[piece])
    to = (source // near * near)[:, None] + np.arange(near)[None, :]
    wants = (last[to, document[:, None]] > piece[:, None]) & (to != source[:, None])
    which, column = np.nonzero(wants)
    found = _Runs(piece[which], start[which], stop[which], source[which], to[which, column])
    return found.pick(np.lexsort((found.start, found.to, found.source)))


def make_relay(placement: Placement, rank: int, found: Hops) -> Plan:
    """The plan of `rank` in two levels; what it attends to is what `make_plan` says."""
    ranks, first = placement.context_parallel_size, placement.cu_seqlens[placement.document]
    mine = np.flatnonzero(placement.rank == rank)
    waits = placement.start[mine] != first[mine]
    own, waiting = np.concatenate([mine[~waits], mine[waits]]), mine[waits]
    # by source and then token, and by receiver and then token: the orders of an all-to-all
    crossed, onward = (step.pick(step.to == rank) for step in (found.between, found.inside))
    leaving, passed = (step.pick(step.source == rank) for step in (found.between, found.inside))
    # all runs at hand, in the order of their rows: own ones, those of the first step, those of the second
    start = np.concatenate([placement.start[own], crossed.start, onward.start])
    stop = np.concatenate([placement.stop[own], crossed.stop, onward.stop])
    row = np.cumsum(stop - start) - (stop - start)
    order = np.argsort(start)
    start, stop, row = start[order], stop[order], row[order]
    # a waiting piece's keys are its document's tokens up to its own last, all of them at hand
    keys = ranges(np.searchsorted(start, first[waiting]), np.searchsorted(start, placement.stop[waiting]))

    def rows_of(runs: _Runs) -> np.ndarray:
        at = np.searchsorted(start, runs.start, side="right") - 1
        begin = row[at] + runs.start - start[at]
        return ranges(begin, begin + runs.stop - runs.start).astype(np.int32)

    return dataclasses.replace(
        make_plan(placement, rank),
        key_index=ranges(row[keys], row[keys] + stop[keys] - start[keys]).astype(np.int32),
        send_index=rows_of(leaving),
        send_counts=tuple(leaving.received(ranks).tolist()),
        recv_counts=tuple(crossed.sent(ranks).tolist()),
        relay=Relay(
            rows_of(passed), tuple(passed.received(ranks).tolist()), tuple(onward.sent(ranks).tolist())
        ),
    )


def group_sizes(ranks: int, ranks_per_node: int) -> list[int]:
    """Ranks of a group: a node's; on one node, divisors of all ranks, from half their root to twice it: with
    few groups the second step is long, with many the first.
    """
    if ranks_per_node < ranks:
        return [ranks_per_node]
    return [n for n in range(2, ranks) if ranks % n == 0 and ranks <= 4 * n * n <= 16 * ranks]


def wire_seconds(moved: Traffic, found: Hops | None, costs: CostModel, *, head_parts: int = 1) -> np.ndarray:
    """Seconds float64 [ranks] that the rows of every rank take one way: each row to every rank that needs it,
    or in the two steps `found`; some heads after others, in so many parts.
    """
    ranks, several_nodes = moved.received.size, moved.crossing.any()
    latency = head_parts * costs.machine.latency_us / 1e6 * (ranks > 1)
    if found is None:
        crossing = np.maximum(moved.crossing, moved.crossing_sent)
        return latency + costs.transfer_seconds(np.maximum(moved.received, moved.sent), crossing)
    between, inside = (
        np.maximum(step.sent(ranks), step.received(ranks)) for step in (found.between, found.inside)
    )
    first = costs.transfer_seconds(between, between if several_nodes else 0)
    return 2 * latency + first + costs.transfer_seconds(inside)
