"""One try at placing documents: whole where they fit, cut by area where not, the short ones last.

Area grows with the square of a document's length, so long documents carry area and short ones carry tokens:

    small ones    come last and fill every rank to its last token. Their pairs a token are the *price* of
                  room: a rank's *need* is the area it lacks, less what filling its room will bring
    medium ones   are kept whole, longest first, on the rank that needs most (or that they fit best)
    long ones     more than any rank needs, are cut into shares (`layout/cut.py`) for the fewest ranks whose
                  needs add up to them. The longest comes last: with most area a token, it meets any need

    documents of 12, 8, 6, 4 and 2 tokens on 2 ranks of 16: 78, 36, 21, 10 and 3 pairs, 74 a rank. 12 is long:
    cut 0-3, 8-12 | 3-8, 48 and 30 pairs; the others then fill up to 16 tokens, 75 and 73 pairs
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.cut import Runs, Share, Takers, area_of, least_received, peel

__all__ = ["Attempt", "Settings", "zigzag"]


@dataclass(frozen=True)
class Settings:
    """How to place documents; `slack` and `small` are parts of a rank's fair share of the area."""

    slack: float  # area above its share that a rank takes before a document is cut
    small: float  # documents of less area only fill
    pack: bool = False  # medium documents go where they fit best, not where most is needed
    filling: float = 0.0  # the shortest documents that make up this part of all tokens fill, small or not
    spread: bool = False  # every document of a few tokens a rank goes to all ranks, at many rows received


def zigzag(tokens: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of at most 2 * ranks chunks of `tokens` and the rank of each: a chunk and its mirror image.

    With few tokens some chunks are empty and left out.
    """
    shares = np.diff(np.arange(ranks + 1) * tokens // ranks)
    first = shares // 2
    lengths = np.concatenate([first, (shares - first)[::-1]])
    owners = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    return np.cumsum(lengths)[lengths > 0], owners[lengths > 0]


class Attempt:
    """Documents count from the longest on; `room`, `need` and `received` are the ranks', so far."""

    def __init__(
        self, lengths: np.ndarray, ranks: int, settings: Settings, ranks_per_node: int | None = None
    ) -> None:
        self.settings, self.nodes = settings, max(1, ranks // (ranks_per_node or ranks))
        self.order = np.argsort(-lengths, kind="stable")
        self.lengths = lengths[self.order]
        self.areas = self.lengths * (self.lengths + 1) / 2
        tokens = int(lengths.sum()) // ranks
        fair = float(self.areas.sum()) / ranks
        self.slack = settings.slack * fair
        self.small = self._first_small(fair, ranks)
        filling = int(self.lengths[self.small :].sum())
        self.price = float(self.areas[self.small :].sum()) / filling if filling else 0.0
        self.room = np.full(ranks, tokens)
        self.need = np.full(ranks, fair - self.price * tokens)
        self.received = np.zeros(ranks, dtype=np.int64)
        self.bound = 0  # rows that the worst rank will have to receive at the least
        # if the longest document is cut, needs may rely on it, and on this area a token
        longest = float(self.areas[0]) - self.price * int(self.lengths[0])
        is_cut = longest > self.need[0] + self.slack or self.lengths[0] > tokens
        self.richness = longest / int(self.lengths[0]) if is_cut else np.inf
        self.pieces: list[tuple[int, int, int, int]] = []  # document, start, stop, rank

    def _first_small(self, fair: float, ranks: int) -> int:
        if self.settings.spread:
            return int(np.searchsorted(-self.lengths, -4 * ranks))
        first = int(np.searchsorted(-self.areas, -self.settings.small * fair))
        if self.settings.filling:
            before = np.cumsum(self.lengths)
            first = min(first, int(np.searchsorted(before, (1 - self.settings.filling) * before[-1])))
        if first == self.lengths.size:
            return first
        # those as long as a small one are small too: what is cut must cost more a token than what fills
        return int(np.searchsorted(-self.lengths, -self.lengths[first]))

    def run(self) -> np.ndarray:
        """Pieces int64 [4, P]: document, start, stop, rank."""
        if self.settings.spread:
            self._spread()
        elif long := self._place_medium():
            self.bound = self._least_received(long[0])
            for document in reversed(long):
                self._cut(document)
        self._fill()
        assert not self.room.any(), f"ranks are left with room for {self.room} tokens"
        pieces = np.array(self.pieces, dtype=np.int64).T
        pieces[0] = self.order[pieces[0]]
        return pieces

    def _give(self, document: int, runs: Runs, rank: int) -> None:
        runs = [(start, stop) for start, stop in runs if stop > start]
        if runs:
            self.pieces += [(document, start, stop, rank) for start, stop in runs]
            tokens = sum(stop - start for start, stop in runs)
            self.received[rank] += runs[-1][1] - tokens
            self.room[rank] -= tokens
            self.need[rank] -= area_of(runs) - self.price * tokens

    def _place_medium(self) -> list[int]:
        """Places medium documents; the long ones, for which no rank has the need and the room."""
        long = []
        for document in range(self.small):
            length = int(self.lengths[document])
            left = self.need - (self.areas[document] - self.price * length)
            fits = (left >= -self.slack) & (self.room - length >= np.maximum(left, 0) / self.richness)
            if not fits.any():
                long.append(document)
            elif self.settings.pack:
                self._give(document, [(0, length)], int(np.where(fits, left, np.inf).argmin()))
            else:
                self._give(document, [(0, length)], int(np.where(fits, left, -np.inf).argmax()))
        return long

    def _least_received(self, document: int) -> int:
        """Rows that the worst of a document's ranks must receive if they have nothing else to take."""
        length = int(self.lengths[document])
        cap = max(float(self.need.max()) + self.slack / 2, 1.0)
        count = min(self.room.size, int((self.areas[document] - self.price * length) / cap) + 1)
        takers = Takers([cap] * count, [int(self.room.max())] * count, [0] * count)
        found = least_received(length, takers, self.price, 0)
        return found[0] if found else length

    def _cut(self, document: int) -> None:
        """Cuts a document into shares for the fewest ranks whose needs add up to its area."""
        length = int(self.lengths[document])
        area = float(self.areas[document]) - self.price * length
        chosen, caps, rooms = self._takers(document, area)
        order = np.argsort(-caps, kind="stable")
        last = int(np.argmax(order))
        chosen, caps, rooms = chosen[order], caps[order], rooms[order]
        found: tuple[int, list[Share]] | None = None
        for leaving in (last, None):
            takers = Takers(caps.tolist(), rooms.tolist(), self.received[chosen].tolist(), leaving)
            tried = least_received(length, takers, self.price, self.bound)
            if tried is not None and (found is None or tried[0] < found[0]):
                found = tried
            if found is not None and found[0] <= self.bound:
                break
        if found is None:
            self._level(document, chosen, caps, rooms)
            return
        for rank, (early, early_stop, late, late_stop) in zip(chosen.tolist(), found[1], strict=True):
            self._give(document, [(early, early_stop), (late, late_stop)], rank)

    def _takers(self, document: int, area: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks for a document of this area above the price, the area of each share and its most tokens."""
        length = int(self.lengths[document])
        spare = 0.0 if document == 0 else 1 / self.richness  # room to leave for a pair of need
        most = area * self.room / length  # what a rank can take if tokens go with area,
        if 0 < spare < length / area:  # and what need is then left finds room
            left = self.room - np.clip(self.need, 0, None) * spare
            most = np.clip(left / (length / area - spare), 0, most)
        caps = np.clip(self.need + self.slack / 2, 0, most)
        if spare == 0 and caps.sum() > area:
            caps = _watered(self.need, most, area)
        caps = self._near(caps, area, document)
        if caps.sum() < area:  # too little need: all take more, as far as rooms go
            free = area * self.room / length - caps
            caps = caps + free * min(1.0, (area - caps.sum()) / free.sum())
        order = np.argsort(-caps, kind="stable")
        count = min(int(np.searchsorted(np.cumsum(caps[order]), area * (1 - 1e-9))), order.size - 1)
        rest = area - float(caps[order[:count]].sum())
        tail = order[count:]
        room = self.room[tail] - np.clip(self.need[tail] - rest, 0, None) * spare
        # the rest goes where it fits best, and best of all as the first tokens of the document
        first_tokens = self.price + np.sqrt(self.price**2 + 2 * max(rest, 0.0))
        takes = caps[tail] >= min(rest, caps[tail[0]])
        fits = takes & (room >= first_tokens)
        if not fits.any():
            fits = takes & (room >= length * rest / area)
        last = tail[np.flatnonzero(fits)[-1]] if fits.any() else tail[0]
        chosen, caps = np.append(order[:count], last), np.append(caps[order[:count]], rest)
        unmet = np.clip(self.need[chosen] - caps, 0, None)
        return chosen, caps, np.clip(self.room[chosen] - (unmet * spare).astype(np.int64), 0, None)

    def _near(self, caps: np.ndarray, area: float, document: int) -> np.ndarray:
        """`caps` of the node with the least that is enough for this area, else of the fewest nodes, and zeros
        elsewhere. The longest document, cut last, goes to whoever is in need.
        """
        by_node = caps.reshape(self.nodes, -1)
        sums = by_node.sum(axis=1)
        enough = sums >= area
        if self.nodes == 1 or (document == 0 and not enough.any()):
            return caps
        chosen = np.zeros(self.nodes, dtype=bool)
        if enough.any():
            chosen[np.where(enough, sums, np.inf).argmin()] = True
        else:
            order = np.argsort(-sums, kind="stable")
            chosen[order[: int(np.searchsorted(np.cumsum(sums[order]), area)) + 1]] = True
        return np.where(chosen[:, None], by_node, 0).reshape(-1)

    def _level(self, document: int, ranks: np.ndarray, caps: np.ndarray, rooms: np.ndarray) -> None:
        """Cuts a document by area as `caps` ask and by tokens as rooms allow, if need be among all ranks."""
        length = int(self.lengths[document])
        if rooms.sum() < length:
            ranks = np.append(ranks, np.setdiff1d(np.arange(self.room.size), ranks))
            caps, rooms = np.append(caps, np.zeros(ranks.size - caps.size)), self.room[ranks]
        tokens = _shared(length, caps, rooms)
        self._peel(document, ranks, tokens, caps + self.price * tokens)

    def _peel(self, document: int, ranks: np.ndarray, tokens: np.ndarray, areas: np.ndarray) -> None:
        """Gives each rank its tokens, with about its area; first those whose tokens are like the average."""
        rest: Runs = [(0, int(self.lengths[document]))]
        unlike = np.abs(areas / np.maximum(tokens, 1) - (rest[0][1] + 1) / 2)
        order = [index for index in np.argsort(unlike, kind="stable").tolist() if tokens[index]]
        for index in order[:-1]:
            runs, rest = peel(rest, int(tokens[index]), float(areas[index]))
            self._give(document, runs, int(ranks[index]))
        self._give(document, rest, int(ranks[order[-1]]))

    def _spread(self) -> None:
        """All but the small documents go to all ranks, in zigzag; largest shares where there is most room."""
        ranks = self.room.size
        for document in range(self.small):
            ends, owners = zigzag(int(self.lengths[document]), ranks)
            starts = np.append(0, ends[:-1])
            held = np.bincount(owners, weights=ends - starts, minlength=ranks)
            taker = np.empty(ranks, dtype=np.int64)
            taker[np.argsort(-held, kind="stable")] = np.argsort(-self.room, kind="stable")
            for start, stop, rank in zip(starts.tolist(), ends.tolist(), taker[owners].tolist(), strict=True):
                self._give(document, [(start, stop)], rank)

    def _fill(self) -> None:
        """Small documents, longest first, where most area is lacking above the price of those to come."""
        lengths, areas = self.lengths[self.small :], self.areas[self.small :]
        self.need, self.price = self.need + self.price * self.room, 0.0  # plain areas from here on
        to_come = np.append(np.cumsum(lengths[::-1])[::-1], 0)
        prices = np.append(np.cumsum(areas[::-1])[::-1], 0) / np.maximum(to_come, 1)
        for index, (length, area) in enumerate(zip(lengths.tolist(), areas.tolist(), strict=True)):
            lacking = self.need - prices[index + 1] * self.room
            rank = int(np.where(self.room >= length, lacking, -np.inf).argmax())
            if self.room[rank] >= length:
                self.pieces.append((self.small + index, 0, length, rank))
                self.room[rank] -= length
                self.need[rank] -= area
            else:
                self._spill(self.small + index, lacking, prices[index + 1])

    def _spill(self, document: int, lacking: np.ndarray, price: float) -> None:
        """Cuts a small document that no rank has room for among those with most room."""
        length, area = int(self.lengths[document]), float(self.areas[document])
        node = np.repeat(self.room.reshape(self.nodes, -1).sum(axis=1), self.room.size // self.nodes)
        near = (node == node.max()) & (node >= length)  # one node, where one has room
        ranks = np.argsort(-np.where(near | (not near.any()), self.room, -1), kind="stable")
        ranks = ranks[: int(np.searchsorted(np.cumsum(self.room[ranks]), length)) + 1]
        tokens = self.room[ranks]
        tokens[-1] -= tokens.sum() - length
        if area <= self.slack:  # whoever has which part makes no difference: as few pieces as can be
            stops = np.cumsum(tokens)
            for rank, start, stop in zip(ranks.tolist(), stops - tokens, stops.tolist(), strict=True):
                self._give(document, [(int(start), stop)], rank)
            return
        level = (lacking[ranks].sum() - area + price * length) / ranks.size
        self._peel(document, ranks, tokens, lacking[ranks] - level + price * tokens)


def _shared(total: int, wishes: np.ndarray, rooms: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to `total`, in proportion to `wishes` as far as `rooms` allow."""
    got = np.minimum(rooms, (total * wishes / wishes.sum()).astype(np.int64))
    for index in np.argsort(-wishes, kind="stable"):
        got[index] += min(int(rooms[index] - got[index]), total - int(got.sum()))
    return got


def _watered(needs: np.ndarray, most: np.ndarray, total: float) -> np.ndarray:
    """Shares that add up to `total`: each the need and some amount, the same for all, from 0 to `most`."""
    high = float(np.abs(needs).max())
    low = -high
    for _ in range(24):
        middle = (low + high) / 2
        if np.clip(needs + middle, 0, most).sum() < total:
            low = middle
        else:
            high = middle
    return np.clip(needs + high, 0, most)
