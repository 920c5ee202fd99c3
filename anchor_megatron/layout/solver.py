"""Where documents go: equal tokens on every rank exactly, attention area as equal as it gets, few rows to send.

Area grows with the square of a document's length, so the two are levelled by different documents: long ones carry area,
short ones carry tokens. Documents are placed longest first. A rank that lacks much area for the room it has left takes
the longest of what is left; a rank that lacks little takes the short ones that come last:

    next rank = the one with the largest (area it lacks) / (tokens it has room for)

A document whose area no single rank can take is split over the fewest ranks that can, in zigzag chunks, so that every one
of them gets an equal share of its tokens and of its area. At the end short documents are cut to fill every rank to its
last token. The whole is tried for several tolerances (how far a rank may be overfull before a document is split rather
than kept whole) and the best kept: balance first, up to what a kernel can tell, then rows received.
"""

from __future__ import annotations

import numpy as np

__all__ = ["split_documents", "zigzag"]

# (tolerance, whether a split document's head may go to a rank of its own), in the order in which they are tried
_ATTEMPTS = ((0.06, False), (0.004, True), (0.02, False), (0.15, False), (0.004, False), (0.02, True))
_ROW_COST = 0.05  # a rank's own number of rows received costs as much as this much imbalance
_GOOD = 1.01  # an attempt that scores this is taken without trying others

Pieces = list[tuple[int, int, int]]  # (first token, token behind the last, rank)


def zigzag(tokens: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of at most 2 * ranks chunks of `tokens` and the rank of each; a chunk and its mirror image are a rank's share.

    With few tokens some chunks are empty and left out.
    """
    shares = np.diff(np.arange(ranks + 1) * tokens // ranks)
    first = shares // 2
    lengths = np.concatenate([first, (shares - first)[::-1]])
    owners = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    return np.cumsum(lengths)[lengths > 0], owners[lengths > 0]


def split_documents(cu_seqlens: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends int64 [P] of pieces and the rank int64 [P] of each, for documents `cu_seqlens` int64 [D+1].

    Every rank gets cu_seqlens[-1] / ranks tokens. Deterministic.
    """
    best = None
    for tolerance, heads_apart in _ATTEMPTS:
        attempt = _Attempt(cu_seqlens, ranks, tolerance, heads_apart=heads_apart)
        attempt.run()
        score = attempt.score()
        if best is None or score < best[0]:
            best = score, attempt.pieces
        if score <= _GOOD:
            break
    assert best is not None, "there is at least one tolerance"
    ends = np.array([stop for _, stop, _ in best[1]], dtype=np.int64)
    return ends, np.array([rank for _, _, rank in best[1]], dtype=np.int64)


class _Attempt:
    def __init__(self, cu_seqlens: np.ndarray, ranks: int, tolerance: float, *, heads_apart: bool) -> None:
        self.heads_apart = heads_apart
        self.share = int(cu_seqlens[-1]) // ranks
        self.starts, self.lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
        areas = self.lengths * (self.lengths + 1) / 2
        self.fair = areas.sum() / ranks
        self.excess = tolerance * self.fair
        self.room = np.full(ranks, int(cu_seqlens[-1]) // ranks)
        self.lack = np.full(ranks, self.fair)
        self.received = np.zeros(ranks, dtype=np.int64)
        self.pieces: Pieces = []
        order = np.argsort(self.lengths, kind="stable")
        self.order = order[::-1]
        # area a token of room takes at the least: that of the shortest documents that fill one rank
        filling = np.cumsum(self.lengths[order]) <= self.room[0]
        tokens = max(1, int(self.lengths[order][filling].sum()))
        self.least = float(areas[order][filling].sum()) / tokens

    def run(self) -> None:
        """Places every document."""
        for document in self.order.tolist():
            start, length = int(self.starts[document]), int(self.lengths[document])
            found = self._ranks_for(length)
            if found is None:
                self._fill(start, length)
            elif len(found[0]) == 1:
                self._give(start, 0, length, found[0][0])
            else:
                self._split(start, length, *found)

    def score(self) -> float:
        """Balance, and what the worst rank's received rows cost on top; 1 is perfect."""
        return 1 - float(self.lack.min()) / self.fair + _ROW_COST * int(self.received.max()) / self.share

    def _ranks_for(self, length: int) -> tuple[list[int], int] | None:
        """The fewest ranks that can take a document of `length`, and the tokens of its head that the last of them takes
        (0: all take equal shares). None where it has to be cut wherever there is room.
        """
        area = length * (length + 1) / 2
        urgency = self.lack / np.maximum(self.room, 1)
        if area <= self.excess / 4:  # too small to overfill a rank: whole, if any has the room
            fits = self.room >= length
            return ([int(np.argmax(np.where(fits, urgency, -np.inf)))], 0) if fits.any() else None
        by_urgency = np.argsort(-urgency, kind="stable")
        for count in range(max(1, int(area / (self.fair + self.excess))), self.room.size + 1):
            options = [self._equal_shares(length, area, count, by_urgency)]
            if count > 1 and self.heads_apart:
                options.append(self._head_apart(length, area, count, by_urgency))
            feasible = [option for option in options if option is not None]
            if feasible:
                return min(feasible, key=lambda option: _most_received(length, *option))
        fits = by_urgency[self.room[by_urgency] >= length]
        return ([int(fits[0])], 0) if fits.size else None

    def _equal_shares(
        self, length: int, area: float, count: int, by_urgency: np.ndarray
    ) -> tuple[list[int], int] | None:
        left = self.room - -(-length // count)
        ok = (left >= 0) & (self.lack + self.excess - area / count >= left * self.least)
        chosen = by_urgency[ok[by_urgency]][:count]
        return (chosen.tolist(), 0) if chosen.size == count else None

    def _head_apart(
        self, length: int, area: float, count: int, by_urgency: np.ndarray
    ) -> tuple[list[int], int] | None:
        """All but one rank share the document's tail until they are full; the last takes its head, which is cheap to send."""
        tail, last = by_urgency[: count - 1], int(by_urgency[count - 1])
        left = self.room[tail] - -(-length // (count - 1))
        rest = area - (count - 1) * float((self.lack[tail] + self.excess - np.maximum(left, 0) * self.least).min())
        head = int(np.ceil(np.sqrt(2 * max(rest, 0.0))))
        if not 0 < head < length or head > self.room[last]:
            return None
        if (self.room[tail] < -(-(length - head) // (count - 1))).any():
            return None
        if self.lack[last] + self.excess - rest < (self.room[last] - head) * self.least:
            return None
        return [*tail.tolist(), last], head

    def _give(self, start: int, begin: int, stop: int, rank: int) -> None:
        """Tokens [begin, stop) of the document at `start` go to `rank`."""
        self.pieces.append((start + begin, start + stop, rank))
        self.room[rank] -= stop - begin
        self.lack[rank] -= (stop - begin) * (stop + begin + 1) / 2

    def _split(self, start: int, length: int, ranks: list[int], head: int) -> None:
        tail = ranks[:-1] if head else ranks
        ends, owners = zigzag(length - head, len(tail))
        cuts = [(head, ranks[-1])] if head else []
        cuts += [(head + end, tail[owner]) for end, owner in zip(ends.tolist(), owners.tolist(), strict=True)]
        begin, held, needed = 0, dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
        for stop, rank in cuts:
            needed[rank] = begin - held[rank]
            held[rank] += stop - begin
            self._give(start, begin, stop, rank)
            begin = stop
        for rank, rows in needed.items():
            self.received[rank] += rows

    def _fill(self, start: int, length: int) -> None:
        """Cuts a document that fits nowhere whole: the ranks with most room take what they can, one after another."""
        begin = 0
        while begin < length:
            rank = int(np.argmax(self.room))
            stop = min(length, begin + int(self.room[rank]))
            assert stop > begin, f"{length - begin} tokens more than the ranks have room for"
            self.received[rank] += begin
            self._give(start, begin, stop, rank)
            begin = stop


def _most_received(length: int, ranks: list[int], head: int) -> float:
    """Rows that the worst rank receives where `ranks` share a document."""
    sharing = len(ranks) - (1 if head else 0)
    return length - (length - head) / sharing
