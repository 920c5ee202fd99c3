"""Who sees whom, and at which position. Stated here once; everything else reads it from here.

A window of documents, each led by a copy of the anchor (a):

    tokens          a  x  y  a  z  w  u        cu_seqlens 0 3 7
    full            0  1  2  3  4  5  6        one attention span: all seven
    document        0  1  2  3  4  5  6        spans 0-3, 3-7
    document_reset  0  1  2  0  1  2  3        spans 0-3, 3-7
    anchor          0  1  2  0  3  4  5        spans 0-3, 3-7

Inside a span attention is causal. In `anchor` every anchor stands at position 0 and the j-th other token of
the window at j: the numbering of the paper's shared form (arXiv 2411.13476), in which one anchor serves all
documents. As the anchor sees only itself, its copies compute the same keys and values, and both forms compute
the same model.
"""

from __future__ import annotations

import numpy as np

__all__ = ["MODES", "attention_cu_seqlens", "positions", "visible"]

MODES = ("full", "document", "document_reset", "anchor")


def attention_cu_seqlens(mode: str, cu_seqlens: np.ndarray, *, window_length: int) -> np.ndarray:
    """Borders int64 [spans + 1] of what attends to itself: whole windows in mode `full`, documents in the
    others.

    `cu_seqlens` int64 [documents + 1] are document borders over one or more windows of `window_length` tokens
    laid one after another. ValueError for an unknown mode or a document that crosses a window's end.
    """
    _check(mode, cu_seqlens, window_length)
    if mode == "full":
        return np.arange(0, cu_seqlens[-1] + 1, window_length, dtype=np.int64)
    return cu_seqlens.astype(np.int64)


def positions(
    mode: str, cu_seqlens: np.ndarray, *, window_length: int, slots: np.ndarray | None = None
) -> np.ndarray:
    """Position int64 [T] of every token; each window starts anew. Arguments and errors as in
    `attention_cu_seqlens`.

    `slots` int64 [T] say at which place of its window each token stands, where chunks of documents are
    interleaved: positions run on in that order. None: at the place where it lies.
    """
    _check(mode, cu_seqlens, window_length)
    tokens = np.arange(cu_seqlens[-1], dtype=np.int64)
    if slots is None:
        slots = tokens % window_length
    if mode in ("full", "document"):
        return slots
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    if mode == "document_reset":
        return tokens - np.repeat(starts, lengths)
    is_anchor = np.zeros(tokens.size, dtype=bool)
    is_anchor[starts] = True
    place = tokens - tokens % window_length + slots
    is_other = np.empty_like(is_anchor)
    is_other[place] = ~is_anchor
    others = np.cumsum(is_other.reshape(-1, window_length), axis=1, dtype=np.int64).reshape(-1)
    return np.where(is_anchor, 0, others[place])


def visible(cu_seqlens: np.ndarray) -> np.ndarray:
    """The mask by its definition, bool [T, T] (query, key), over attention spans `cu_seqlens`."""
    span = np.repeat(np.arange(cu_seqlens.size - 1), np.diff(cu_seqlens))
    token = np.arange(span.size)
    return (token[None, :] <= token[:, None]) & (span[None, :] == span[:, None])


def _check(mode: str, cu_seqlens: np.ndarray, window_length: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    if cu_seqlens.size < 2 or cu_seqlens[0] != 0 or (np.diff(cu_seqlens) < 1).any():
        raise ValueError(f"cu_seqlens: got {cu_seqlens}, expected to rise from 0 by at least 1 a document")
    if cu_seqlens[-1] % window_length:
        raise ValueError(
            f"tokens: got {cu_seqlens[-1]}, expected a multiple of window_length = {window_length}"
        )
    ends = np.arange(window_length, cu_seqlens[-1] + 1, window_length)
    if not np.isin(ends, cu_seqlens).all():
        raise ValueError(f"cu_seqlens: got a document across the end of a window of {window_length} tokens")
