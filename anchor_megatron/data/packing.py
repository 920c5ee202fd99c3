"""Documents packed into windows; any window of any epoch can be asked for directly.

An epoch is a shuffled order of all documents, laid out as one stream of slots: an anchor, then the document's
tokens. Two documents of 3 and 4 tokens (slots a x y z | a p q r s), windows of 5:

    window 0   a x y z a     the last slot holds an anchor alone: padding; window 1 begins at this slot again
    window 1   a p q r s

Windows of 4 would be a x y z | a p q r | a s . . as a cut document goes on behind an anchor of its own.

So window n+1 begins at the slot where window n ends, or one before it where that cuts a document: the slot
before the first new token shows the anchor. Starts are a stride of S-1 but for the windows that end exactly
with a document. Every token of every document appears once an epoch, and every token but a document's first
is a label once; the slots behind the last document are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.window import Window

__all__ = ["WindowDataset", "window_starts"]

_BLOCK = 64  # windows whose starts are guessed at once; twice as many after each block that was right


@dataclass(frozen=True)
class _Epoch:
    """order int64 [d]: documents; borders int64 [d+1]: their first slots; starts int64 [w]: the windows'
    first slots.
    """

    order: np.ndarray
    borders: np.ndarray
    starts: np.ndarray


class WindowDataset:
    """Windows of `seq_length` tokens, anchors included, over endless epochs: a function of (documents, seed,
    n) alone.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        seq_length: int,
        anchor_token: int,
        seed: int,
        anchor_loss: bool = False,
    ) -> None:
        """`anchor_loss`: the anchor before a document's first token is trained to predict it.

        ValueError where a window could not hold an anchor and a token.
        """
        if seq_length < 2:
            raise ValueError(
                f"data.seq_length: got {seq_length}, expected at least 2 (an anchor and a token)"
            )
        self.documents, self.seq_length, self.seed = documents, seq_length, seed
        self.anchor_token, self.anchor_loss = anchor_token, anchor_loss
        self._epochs: dict[int, _Epoch] = {}
        self._first_windows = [0]  # of epochs 0, 1, ...; grows as later ones are asked for

    def __getitem__(self, n: int) -> Window:
        epoch, index = self.locate(n)
        return self._assemble(self._epoch(epoch), index)

    def locate(self, n: int) -> tuple[int, int]:
        """(epoch, window within it) of window `n` >= 0."""
        while n >= self._first_windows[-1]:
            epoch = len(self._first_windows) - 1
            self._first_windows.append(self._first_windows[-1] + self._epoch(epoch).starts.size)
        epoch = int(np.searchsorted(self._first_windows, n, side="right")) - 1
        return epoch, n - self._first_windows[epoch]

    def windows_per_epoch(self, epoch: int) -> int:
        """Windows of an epoch; it varies a little, as documents are cut at other places."""
        return self._epoch(epoch).starts.size

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            lengths = self.documents.lengths
            shuffled = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(lengths.size)
            order = shuffled[lengths[shuffled] > 0]
            borders = np.concatenate([[0], np.cumsum(lengths[order] + 1)])
            made = _Epoch(order, borders, window_starts(borders, self.seq_length))
            self._epochs = {**{e: made_ for e, made_ in self._epochs.items() if e == epoch - 1}, epoch: made}
        return self._epochs[epoch]

    def _assemble(self, epoch: _Epoch, index: int) -> Window:
        begin = int(epoch.starts[index])
        filled = min(self.seq_length, int(epoch.borders[-1]) - begin)  # slots before the epoch is over
        first = int(np.searchsorted(epoch.borders, begin, side="right")) - 1
        last = int(np.searchsorted(epoch.borders, begin + filled, side="left")) - 1
        slots, documents = epoch.borders[first : last + 1], epoch.order[first : last + 1].copy()
        offsets = np.maximum(begin - slots, 0)  # tokens of each piece's document that came before
        starts = np.maximum(slots - begin, 0)
        counts = np.append(starts[1:], filled) - starts - 1
        if counts[-1] == 0:  # an anchor for which no token was left
            documents[-1] = -1
        left = self.documents.lengths[documents[-1]] - offsets[-1] - counts[-1]
        is_cut = bool(filled == self.seq_length and documents[-1] >= 0 and left > 0)
        counts[-1] += is_cut  # one token more than the window shows: its last label
        found = self.documents.tokens(documents, offsets, offsets + counts)
        if filled < self.seq_length:
            starts, offsets = np.append(starts, filled), np.append(offsets, 0)
            documents = np.append(documents, -1)
        return self._window(found, starts, documents, offsets, is_cut)

    def _window(
        self, found: np.ndarray, starts: np.ndarray, documents: np.ndarray, offsets: np.ndarray, is_cut: bool
    ) -> Window:
        """`found`: the window's own tokens in order, and the one behind it where it cuts a document."""
        is_own = np.ones(self.seq_length + 1, dtype=bool)  # not an anchor; a slot more, for the last label
        is_own[starts] = False
        if documents[-1] < 0:
            is_own[starts[-1] :] = False
        is_own[-1] = is_cut
        tokens = np.full(self.seq_length + 1, self.anchor_token, dtype=np.int64)
        tokens[is_own] = found
        # a token's label is the one after it, unless that is an anchor: another piece begins
        loss_mask = is_own[1:].copy()
        loss_mask[starts] &= self.anchor_loss & (offsets == 0) & (documents >= 0)
        labels = np.where(loss_mask, tokens[1:], 0)
        cu_seqlens = np.append(starts, self.seq_length)
        return Window(tokens[:-1], labels, loss_mask, cu_seqlens, documents, offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


def window_starts(borders: np.ndarray, seq_length: int) -> np.ndarray:
    """First slot of every window: int64 [windows]; see the file's opening.

    Strides of S-1 are guessed for a block of windows and hold up to the first that ends with a document. So
    the work grows with the number of such ends, not of documents.
    """
    stride, total, at, block = seq_length - 1, int(borders[-1]), 0, _BLOCK
    parts: list[np.ndarray] = []
    while at < total:
        guess = np.arange(at, min(at + block * stride, total), stride)
        ends = guess + seq_length
        on_border = borders[np.minimum(np.searchsorted(borders, ends), borders.size - 1)] == ends
        hit = bool(on_border.any())
        stop = int(np.argmax(on_border)) if hit else guess.size - 1
        parts.append(guess[: stop + 1])
        at = int(ends[stop]) - (0 if hit else 1)
        block = _BLOCK if hit else 2 * block
    return np.concatenate(parts)
