"""One packed training sequence.

Documents of tokens 5 6 7 and 8 9, anchor token 1, a window of 8 whose last slot is too short for a third
document:

    tokens      1  5  6  7  1  8  9  1
    labels      0  6  7  0  0  9  0  0      0 where there is none
    loss_mask   .  x  x  .  .  x  .  .
    cu_seqlens  0 4 7 8      document_ids 0 1 -1      document_offsets 0 0 0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """S tokens, D pieces of documents; each piece begins with a copy of the anchor.

    tokens            int64 [S]
    labels            int64 [S]    the token after, in the same document (0 where masked)
    loss_mask         bool  [S]    where a label is trained on
    cu_seqlens        int64 [D+1]  borders of the pieces
    document_ids      int64 [D]    -1 for padding
    document_offsets  int64 [D]    the piece's first own token inside its document
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray
    document_ids: np.ndarray
    document_offsets: np.ndarray

    @property
    def padding_tokens(self) -> int:
        """Tokens that belong to no document."""
        return int(np.diff(self.cu_seqlens)[self.document_ids < 0].sum())
