"""Interleaved chunks: documents of a window cut at random places, their chunks shuffled among each other.

Documents x and p (leads a), cut once each:

    rows       a x x x x a p p p          documents stay contiguous: attention is per document
    chunks     0 0 0 1 1 2 2 3 3
    window     a x x a p x x p p          the order in which the window tells them: 0 2 1 3
    slots      0 1 2 5 6 3 4 7 8          each row's place in the window

Chunks of one document keep their order, so that every token still follows what it may see (arXiv 2411.13476,
interleaved chunks). Positions then come from slots; nothing else changes.
"""

from __future__ import annotations

import numpy as np

__all__ = ["interleaved_slots"]


def interleaved_slots(
    cu_seqlens: np.ndarray, is_own: np.ndarray, *, filled: int, mean: int, generator: np.random.Generator
) -> np.ndarray:
    """Place int64 [S] of every row in its window.

    cu_seqlens int64 [D+1]  borders of the documents' pieces, padding last
    is_own     bool [S]     rows that are documents' own tokens; what leads a piece goes with its first chunk
    filled                  rows before the padding, which stays where it is
    mean                    tokens of a chunk, on average: each place between two own tokens is cut as likely
    """
    slots = np.arange(is_own.size)
    if not filled:
        return slots
    begins = np.zeros(filled, dtype=bool)
    begins[cu_seqlens[:-1][cu_seqlens[:-1] < filled]] = True
    both_own = is_own[1:filled] & is_own[: filled - 1]  # a piece's first own token follows its lead
    begins[1:] |= both_own & (generator.random(filled - 1) < 1 / mean)
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=filled)
    piece = np.searchsorted(cu_seqlens, starts, side="right")
    # the k-th place that a shuffle of chunks gives to a piece goes to the piece's k-th chunk
    place = np.argsort(generator.permutation(piece), kind="stable")
    told = np.empty_like(place)
    told[place] = np.arange(place.size)
    before = np.empty_like(lengths)
    before[told] = np.cumsum(lengths[told]) - lengths[told]
    slots[:filled] += np.repeat(before - starts, lengths)
    return slots
