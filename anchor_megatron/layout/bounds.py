"""What no placement can beat: the least unevenness, and the fewest rows the worst rank can receive.

Documents of 12 and 4 tokens on two ranks of 8, 88 pairs: the rank with the last of the 12 holds 8 of them
at most and must receive 4; the bound below says 3. The proof, for any document of l tokens and any number
R of rows:

    Look at its last x tokens, and at the m ranks that hold them. Each of these ranks needs at least the l
    - x keys before them, receives at most R, and so holds at least l - x - R tokens of the document. All m
    together hold h >= max(x, m (l - x - R)) of its tokens: the last x, and others that cost no less than
    the first h - x; and m t - h tokens of other documents (t tokens a rank), which cost no less than the
    cheapest there are. If for some x no m and h keep this below m times the area a rank may have, R is too
    few.

A token costs its place in its document (1 for the first), for which its place less a half is a lower bound
that makes sums integrals. The bound is not tight: it lets every rank have the early tokens, which are
there once.
"""

from __future__ import annotations

import numpy as np

__all__ = ["least_received_rows", "least_unevenness"]

_LAST_PARTS = np.array([0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8])


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
    tokens = float(cu_seqlens[-1]) / ranks
    bound = 0
    for document, length in enumerate(lengths.tolist()):
        if length <= bound or length * length / 2 <= most / 2:
            break
        others = _Cheapest(np.delete(lengths, document))
        low, high = bound, int(length)
        while low < high:
            middle = (low + high) // 2
            if _may_receive(middle, length, tokens, most, others, ranks):
                high = middle
            else:
                low = middle + 1
        bound = low
    return bound


def _may_receive(rows: int, length: float, tokens: float, most: float, others: _Cheapest, ranks: int) -> bool:
    """Whether the argument above does not rule out that no rank receives more than `rows`."""
    x = np.maximum(1.0, _LAST_PARTS[:, None] * (length - rows))
    m = np.arange(1, ranks + 1, dtype=np.float64)[None, :]
    least = np.maximum(np.maximum(x, m * (length - x - rows)), m * tokens - others.counts[-1])
    largest = np.minimum(length, m * tokens) + np.zeros_like(least)
    possible = (least <= largest) & (np.maximum(length - x - rows, 0) <= tokens)
    # area is convex in h: cheapest where one more of its early tokens costs what one of the others' does
    low, high = least, np.maximum(largest, least)
    for _ in range(30):
        h = (low + high) / 2
        dearer = h - x > others.dearest(m * tokens - h)
        low, high = np.where(dearer, low, h), np.where(dearer, h, high)
    area = x * (length - x / 2) + (low - x) ** 2 / 2 + others.area(m * tokens - low)
    enough = possible & (area <= m * most + 1e-6)
    return bool(enough.any(axis=1).all())


class _Cheapest:
    """The cheapest n tokens of documents: the first c of each, c chosen so that they are n."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = np.concatenate([[0.0], np.sort(lengths)])
        left = self.lengths.size - np.arange(self.lengths.size) - 1  # documents longer than this one
        self.counts = np.cumsum(self.lengths) + self.lengths * left
        self.areas = np.cumsum(self.lengths**2) / 2 + self.lengths**2 / 2 * left

    def dearest(self, count: np.ndarray) -> np.ndarray:
        """What the n-th costs; the longest document's last token where there are not so many."""
        return np.interp(count, self.counts, self.lengths)

    def area(self, count: np.ndarray) -> np.ndarray:
        """What n cost together; infinite where there are not so many."""
        index = np.clip(np.searchsorted(self.counts, count, side="right") - 1, 0, self.counts.size - 1)
        cost = self.lengths[index]
        more = self.dearest(count)
        area = self.areas[index] + (count - self.counts[index]) * (cost + more) / 2
        return np.where(count > self.counts[-1] + 1e-6, np.inf, area)
