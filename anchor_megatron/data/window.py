"""One packed training sequence.

Documents of tokens 5 6 7 and 8 9, anchor token 1, a window of 8 whose last slot is too short for a third
document:

    tokens      1  5  6  7  1  8  9  1
    labels      0  6  7  0  0  9  0  0      0 where there is none
    loss_mask   .  x  x  .  .  x  .  .
    cu_seqlens  0 4 7 8      document_ids 0 1 -1      document_offsets 0 0 0

Rows of a document always lie together. Where chunks of documents are interleaved, `slots` says at which place
of the window each row stands (`data/interleave.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Window", "WindowCounts"]


@dataclass(frozen=True)
class WindowCounts:
    """What a window holds, in tokens or documents."""

    tokens: int = 0
    """documents' own tokens"""
    pieces: int = 0
    """documents, or parts of them, each with an anchor"""
    tags: int = 0
    """tokens of tags"""
    padding: int = 0
    """tokens that belong to no document"""
    cut: int = 0
    """pieces whose document goes on elsewhere"""
    joined: int = 0
    """documents that share an anchor with the one before, as they are short"""
    dropped: int = 0
    """documents left out on the way to this window, as they are short"""


@dataclass(frozen=True)
class Window:
    """S tokens, D pieces of documents; each piece begins with a copy of the anchor.

    tokens            int64 [S]
    labels            int64 [S]    the token after, in the same document (0 where masked)
    loss_mask         bool  [S]    where a label is trained on
    cu_seqlens        int64 [D+1]  borders of the pieces
    document_ids      int64 [D]    -1 for padding; of joined documents the first
    document_offsets  int64 [D]    the piece's first own token inside its document
    counts                         zeros for a window that nobody counts
    slots             int64 [S]    each row's place in the window; None: rows stand as they lie
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray
    document_ids: np.ndarray
    document_offsets: np.ndarray
    counts: WindowCounts = WindowCounts()
    slots: np.ndarray | None = None
