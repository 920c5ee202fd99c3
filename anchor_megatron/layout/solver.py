"""Where documents go: equal tokens on every rank exactly, attention area level, few rows to receive, few pieces.

Area grows with the square of a document's length, so long documents carry area and short ones carry tokens:

    small documents   come last; they fill every rank to its last token. Their pairs a token are the *price* of
                      a token of room, so a rank's *need* is counted above it: fair area - area - price * room
    medium ones       are kept whole, longest first, on the rank that needs most or, tried too, that they fit best
    long ones         whose area no rank can take are cut into shares (`layout/cut.py`) that meet the needs of
                      the fewest ranks; the longest comes last, for it can meet any needs

    documents of 40, 9, 9, 5 and 1 tokens on 4 ranks of 16: the one of 40 has 820 of the 926 pairs, and is cut
    into shares for all four ranks; the others are small

The whole is tried for a few settings and what costs least in `layout/cost.py` is kept. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.cut import Runs, Share, area_of, cut_shares, least_received, peel

__all__ = ["split_documents", "zigzag"]


@dataclass(frozen=True)
class _Settings:
    slack: float  # area a rank may have above the fair share, as a part of it, before a document is cut
    small: float  # documents below this part of the fair share only fill
    pack: bool  # medium documents go where they fit best, not where most is needed


_TRIED = tuple(_Settings(slack, 0.1, pack) for slack in (0.01, 0.003) for pack in (True, False))


def zigzag(tokens: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of at most 2 * ranks chunks of `tokens` and the rank of each; a chunk and its mirror image are a rank's share.

    With few tokens some chunks are empty and left out.
    """
    shares = np.diff(np.arange(ranks + 1) * tokens // ranks)
    first = shares // 2
    lengths = np.concatenate([first, (shares - first)[::-1]])
    owners = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    return np.cumsum(lengths)[lengths > 0], owners[lengths > 0]


def split_documents(cu_seqlens: np.ndarray, ranks: int, costs: CostModel) -> tuple[np.ndarray, np.ndarray]:
    """Ends int64 [P] of pieces and the rank int64 [P] of each, for documents `cu_seqlens` int64 [D+1].

    Every rank gets cu_seqlens[-1] / ranks tokens. Deterministic.
    """
    if cu_seqlens.size == 2:
        return zigzag(int(cu_seqlens[-1]), ranks)
    lengths = np.diff(cu_seqlens)
    best: tuple[float, np.ndarray] | None = None
    for settings in _TRIED:
        attempt = _Attempt(lengths, ranks, settings)
        pieces = attempt.run()
        seconds = _seconds(pieces, ranks, costs)
        if best is None or seconds < best[0]:
            best = seconds, pieces
    assert best is not None, "there is at least one setting"
    document, _, stop, rank = best[1].T
    return cu_seqlens[document] + stop, rank


def _seconds(pieces: np.ndarray, ranks: int, costs: CostModel) -> float:
    document, start, stop, rank = pieces.T
    received = rows_received(document, stop, stop - start, rank, ranks)
    return costs.seconds(queries=stop - start, keys=stop, rank=rank, received=received)


def rows_received(document: np.ndarray, stop: np.ndarray, tokens: np.ndarray, rank: np.ndarray, ranks: int) -> np.ndarray:
    """Rows int64 [ranks] that each rank receives: of every document, all up to its last token that it does not hold.

    `document`, `stop` (counted from the document's first token), `tokens`, `rank`: int64 [P] of each piece.
    """
    held_by, which = np.unique(document * ranks + rank, return_inverse=True)
    last = np.zeros(held_by.size, dtype=np.int64)
    np.maximum.at(last, which, stop)
    missing = last - np.bincount(which, weights=tokens, minlength=held_by.size).astype(np.int64)
    return np.bincount(held_by % ranks, weights=missing, minlength=ranks).astype(np.int64)


class _Attempt:
    """One try at one setting; `room` and `need` (above the price) are what ranks still have to take."""

    def __init__(self, lengths: np.ndarray, ranks: int, settings: _Settings) -> None:
        self.settings = settings
        self.order = np.argsort(-lengths, kind="stable")  # longest first; everything below counts in this order
        self.lengths = lengths[self.order]
        self.areas = self.lengths * (self.lengths + 1) / 2
        tokens = int(lengths.sum()) // ranks
        self.fair = float(self.areas.sum()) / ranks
        self.slack = settings.slack * self.fair
        self.small = int(np.searchsorted(-self.areas, -settings.small * self.fair))
        filling = int(self.lengths[self.small :].sum())
        self.price = float(self.areas[self.small :].sum()) / filling if filling else 0.0
        self.room = np.full(ranks, tokens)
        self.need = np.full(ranks, self.fair - self.price * tokens)
        # pairs a token above the price that the longest document can bring to a rank; if it is cut, ranks rely on it
        longest = float(self.areas[0]) - self.price * int(self.lengths[0])
        is_cut = longest > self.need[0] + self.slack or self.lengths[0] > tokens
        self.reach = longest / int(self.lengths[0]) if is_cut else np.inf
        self.pieces: list[tuple[int, int, int, int]] = []  # document, start, stop, rank

    def run(self) -> np.ndarray:
        """Pieces int64 [P, 4]: document, start, stop, rank."""
        long = self._place_medium()
        bound = self._bound(long[0]) if long else 0
        for document in reversed(long):
            self._cut(document, bound)
        self._fill()
        pieces = np.array(self.pieces, dtype=np.int64)
        pieces[:, 0] = self.order[pieces[:, 0]]
        return pieces

    def _give(self, document: int, runs: Runs, rank: int) -> None:
        for start, stop in runs:
            if stop > start:
                self.pieces.append((document, start, stop, rank))
        tokens = sum(stop - start for start, stop in runs)
        self.room[rank] -= tokens
        self.need[rank] -= area_of(runs) - self.price * tokens

    def _place_medium(self) -> list[int]:
        """Places documents whole where their area fits; those for which it does not, longest first."""
        long = []
        for document in range(self.small):
            length = int(self.lengths[document])
            left = self.need - (self.areas[document] - self.price * length)
            fits = (left >= -self.slack) & (self.room - length >= left / self.reach)
            if not fits.any():
                long.append(document)
            elif self.settings.pack:
                self._give(document, [(0, length)], int(np.where(fits, left, np.inf).argmin()))
            else:
                self._give(document, [(0, length)], int(np.where(fits, left, -np.inf).argmax()))
        return long

    def _bound(self, document: int) -> int:
        """Rows that the longest document's ranks must receive in any case, had they nothing else to take."""
        length, tokens = int(self.lengths[document]), int(self.room.max())
        cap = float(self.need.max()) + self.slack / 2
        count = int((self.areas[document] - self.price * length) / cap) + 1
        found = least_received(length, [cap] * count, [tokens] * count, self.price, 0)
        return found[0] if found else length

    def _cut(self, document: int, bound: int) -> None:
        """Cuts a document into shares for the fewest ranks whose needs add up to its area."""
        length = int(self.lengths[document])
        area = float(self.areas[document]) - self.price * length
        spare = 0.0 if document == 0 else 1 / self.reach  # room that need left over will take
        chosen, caps, rooms = self._takers(length, area, spare)
        found = least_received(length, caps, rooms, self.price, bound)
        if found is None:
            self._level(document, chosen, np.array(caps), np.array(rooms))
            return
        for rank, (early, early_stop, late, late_stop) in zip(chosen.tolist(), found[1], strict=True):
            self._give(document, [(early, early_stop), (late, late_stop)], rank)

    def _takers(self, length: int, area: float, spare: float) -> tuple[np.ndarray, list[float], list[int]]:
        """Ranks for a document, those that can take most first, the area of each one's share and its most tokens."""
        # what a rank can take if tokens go with area, and the need it is left with finds room
        most = area * self.room / length
        if 0 < spare < length / area:
            left = self.room - np.clip(self.need, 0, None) * spare
            most = np.clip(left / (length / area - spare), 0, most)
        caps = np.clip(self.need + self.slack / 2, 0, most)
        if spare == 0 and caps.sum() > area:
            caps = _watered(self.need, most, area)
        if caps.sum() < area:  # nobody has enough: all take more, as far as rooms go
            free = area * self.room / length - caps
            caps = caps + free * min(1.0, (area - caps.sum()) / free.sum())
        order = np.argsort(-caps, kind="stable")
        count = int(np.searchsorted(np.cumsum(caps[order]), area * (1 - 1e-9)))
        count = min(count, order.size - 1)
        rest = area - float(caps[order[:count]].sum())
        tail = order[count:]
        room = self.room - np.clip(self.need - rest, 0, None) * spare
        fits = (caps[tail] >= min(rest, caps[tail[0]])) & (room[tail] >= length * rest / area)
        last = tail[np.flatnonzero(fits)[-1]] if fits.any() else tail[0]  # the last share goes where it fits best
        chosen = np.append(order[:count], last)
        rooms = self.room[order[:count]].tolist() + [max(0, int(room[last]))]
        return chosen, [*caps[order[:count]].tolist(), rest], rooms

    def _level(self, document: int, ranks: np.ndarray, caps: np.ndarray, rooms: np.ndarray) -> None:
        """Cuts a document so that ranks end up with areas as `caps` ask and tokens as rooms allow."""
        length = int(self.lengths[document])
        if rooms.sum() < length:
            others = np.setdiff1d(np.argsort(-self.room, kind="stable"), ranks)
            ranks = np.append(ranks, others)
            caps = np.append(caps, np.zeros(ranks.size - caps.size)); rooms = self.room[ranks]
        tokens = _shared(length, caps, rooms)
        areas = caps + self.price * tokens
        self._peel(document, ranks, tokens, areas)

    def _peel(self, document: int, ranks: np.ndarray, tokens: np.ndarray, areas: np.ndarray) -> None:
        length = int(self.lengths[document])
        mean = (length + 1) / 2
        unlike = np.abs(areas / np.maximum(tokens, 1) - mean)
        order = [index for index in np.argsort(unlike, kind="stable") if tokens[index]]
        rest: Runs = [(0, length)]
        for index in order[:-1]:
            runs, rest = peel(rest, int(tokens[index]), float(areas[index]))
            self._give(document, runs, int(ranks[index]))
        self._give(document, rest, int(ranks[order[-1]]))

    def _fill(self) -> None:
        """Small documents, longest first, to the rank that needs most above the price of what is still to come."""
        lengths, areas = self.lengths[self.small :], self.areas[self.small :]
        self.need, self.price = self.need + self.price * self.room, 0.0  # plain areas from here on
        to_come = np.append(np.cumsum(lengths[::-1])[::-1], 0)
        prices = np.append(np.cumsum(areas[::-1])[::-1], 0) / np.maximum(to_come, 1)
        for index, (length, area) in enumerate(zip(lengths.tolist(), areas.tolist(), strict=True)):
            above = self.need - prices[index + 1] * self.room
            rank = int(np.where(self.room >= length, above, -np.inf).argmax())
            if self.room[rank] >= length:
                self.pieces.append((self.small + index, 0, length, rank))
                self.room[rank] -= length
                self.need[rank] -= area
            else:
                self._spill(self.small + index, above, prices[index + 1])

    def _spill(self, document: int, above: np.ndarray, price: float) -> None:
        """Cuts a small document that no rank has room for among those with most room."""
        length, area = int(self.lengths[document]), float(self.areas[document])
        ranks = np.argsort(-self.room, kind="stable")
        ranks = ranks[: int(np.searchsorted(np.cumsum(self.room[ranks]), length)) + 1]
        tokens = self.room[ranks]
        tokens[-1] -= tokens.sum() - length
        level = (above[ranks].sum() - area + price * length) / ranks.size
        self._peel(document, ranks, tokens, above[ranks] - level + price * tokens)


def _watered(needs: np.ndarray, most: np.ndarray, total: float) -> np.ndarray:
    """Shares that add up to `total`, each the need and the same amount more, between 0 and `most`."""
    low, high = -float(np.abs(needs).max()), float(np.abs(needs).max())
    for _ in range(24):
        middle = (low + high) / 2
        if np.clip(needs + middle, 0, most).sum() < total:
            low = middle
        else:
            high = middle
    return np.clip(needs + high, 0, most)


def _shared(total: int, wishes: np.ndarray, rooms: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to `total`, in proportion to `wishes` as far as `rooms` allow."""
    got = np.minimum(rooms, (total * wishes / wishes.sum()).astype(np.int64))
    for index in np.argsort(-wishes, kind="stable"):
        more = min(int(rooms[index] - got[index]), total - int(got.sum()))
        got[index] += more
    return got
