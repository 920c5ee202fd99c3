"""What no placement can beat: the least unevenness, and the fewest rows the worst rank can receive.

Documents of 12 and 4 tokens on two ranks of 8, 88 pairs: the rank with the last of the 12 holds 8 of them
at most and must receive 4; the bound below says 4 too. The proof, for any document of l tokens, t tokens a
rank and any number R of rows:

    Number the ranks that hold tokens of it by the end of what they hold: e_1 = l > e_2 > e_3 ... Rank k
    needs the e_k tokens before its end and receives at most R, so it holds e_k - R of them or more. The
    first j ranks hold the last x = l - e_(j+1) tokens, as all others end before them, so besides those at
    least h - x early ones, h being the sum of e_k - R; and other tokens until they have j t. The late ones
    cost what they do, the early ones no less than the first h - x, the others no less than the cheapest
    there are. That must be within j times the area a rank may have: the smallest e_(j+1) for which it can be
    is a bound for that end, from which follows one for the next.

If the ends come down to R, nothing more is asked of the others. If for some j there is no e_(j+1), R is too
few. Not tight: the document's other ranks are asked for nothing, nor are other documents.

A token costs its place in its document (1 for the first), for which its place less a half is a lower bound
that makes sums integrals.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

__all__ = ["least_received_rows", "least_unevenness"]

_PARTS = 64  # in which ends above the last one found are looked at


def least_unevenness(cu_seqlens: np.ndarray, ranks: int) -> float:
    """The least largest-over-mean area of documents `cu_seqlens` int64 [D+1] on `ranks` of equal tokens.

    Pairs are whole, and one rank has the last token of the longest document and others beside it.
    """
    lengths = np.diff(cu_seqlens)
    mean = float((lengths * (lengths + 1) // 2).sum()) / ranks
    last_token = int(lengths.max()) + int(cu_seqlens[-1]) // ranks - 1
    return max(1.0, np.ceil(mean) / mean, last_token / mean)


def least_received_rows(cu_seqlens: np.ndarray, ranks: int, *, unevenness: float) -> int:
    """Rows that the worst rank receives at the least in any placement of equal tokens a rank whose largest
    area is at most `unevenness` times the mean; documents `cu_seqlens` int64 [D+1].
    """
    lengths = np.sort(np.diff(cu_seqlens))[::-1].astype(np.float64)
    most = unevenness * float((lengths * (lengths + 1) / 2).sum()) / ranks
    tokens, all_tokens = float(cu_seqlens[-1]) / ranks, _Cheapest(lengths)
    bound = 0
    for document, length in enumerate(lengths.tolist()):
        if length <= bound or length * length / 2 <= most / 2:
            break
        others = _Cheapest(np.delete(lengths, document))
        ends = _Ends(length, ranks, tokens, most, all_tokens, others)
        low, high = bound, int(length)
        while low < high:
            middle = (low + high) // 2 if low > bound else low  # mostly another document's bound is enough
            if ends.may_come_down_to(middle):
                high = middle
            else:
                low = middle + 1
        bound = low
    return bound


@dataclass(frozen=True)
class _Ends:
    """The argument above for one document; `tokens` and `most` area a rank, the cheapest of all documents'
    tokens and of the others'.
    """

    length: float
    ranks: int
    tokens: float
    most: float
    all_tokens: _Cheapest
    others: _Cheapest

    def may_come_down_to(self, rows: int) -> bool:
        """Whether it does not rule out that no rank receives more than `rows`."""
        ends = [self.length]  # bounds on the first ranks' ends
        for _ in range(self.ranks):
            if ends[0] - rows > self.tokens:
                return False
            held = sum(ends) - rows * len(ends)
            low, high = 0, int(ends[-1]) - 1
            if self._fits(len(ends), high, high, held):
                while low < high:  # below the last end, the larger the next the cheaper
                    middle = (low + high) // 2
                    if self._fits(len(ends), middle, middle, held):
                        high = middle
                    else:
                        low = middle + 1
            else:
                low = self._above(ends, rows)
                if low < 0:
                    return False
                ends = [max(end, low + 1) for end in ends]
            if low <= rows:
                return True
            ends.append(low)
        return False

    def _above(self, ends: list[float], rows: int) -> int:
        """A bound for the next end if it is above the last bound found, as then are those before it; -1 if it
        cannot be there either. Looks at whole parts: at each part's cheapest, whatever in it the end is.
        """
        step = (self.length - ends[-1]) / _PARTS
        for part in range(_PARTS if step else 0):
            low, high = ends[-1] + step * part, ends[-1] + step * (part + 1)
            held = sum(max(end, low + 1) - rows for end in ends)
            if self._fits(len(ends), low, high, held):
                return int(low)
        return -1

    def _fits(self, ranks: int, low: float, high: float, held: float) -> bool:
        """Whether so many ranks have the area for the document's tokens from `high` on, as many early ones
        as make `held` with those from `low` on, and others.
        """
        late, early = self.length - high, max(0.0, held - (self.length - low))
        free = ranks * self.tokens - late
        if free < early:
            return False
        area, dearest = self.all_tokens.area(free)  # which has so many of this document's early tokens
        if dearest < early:
            area = early * early / 2 + self.others.area(free - early)[0]
        return late * (self.length - late / 2) + area <= ranks * self.most + 1e-6


class _Cheapest:
    """The cheapest n tokens of documents: the first c of each, c chosen so that they are n."""

    def __init__(self, lengths: np.ndarray) -> None:
        costs = np.concatenate([[0.0], np.sort(lengths)])
        left = costs.size - np.arange(costs.size) - 1  # documents longer than this one
        self.costs: list[float] = costs.tolist()
        self.counts: list[float] = (np.cumsum(costs) + costs * left).tolist()
        self.areas: list[float] = (np.cumsum(costs**2) / 2 + costs**2 / 2 * left).tolist()

    def area(self, count: float) -> tuple[float, float]:
        """What n cost together, infinite where there are not so many; and what the n-th costs."""
        index = bisect_right(self.counts, count) - 1
        if index == len(self.counts) - 1:
            return self.areas[-1] if count <= self.counts[-1] + 1e-6 else np.inf, self.costs[-1]
        cost, begin = self.costs[index], self.counts[index]
        slope = (self.costs[index + 1] - cost) / (self.counts[index + 1] - begin)
        dearest = cost + slope * (count - begin)
        return self.areas[index] + (count - begin) * (cost + dearest) / 2, dearest
