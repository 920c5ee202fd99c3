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

__all__ = ["WindowDataset"]

_BLOCK = 4096  # windows whose starts are guessed at once


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
            made = _Epoch(order, borders, _window_starts(borders, self.seq_length))
            self._epochs = {**{e: made_ for e, made_ in self._epochs.items() if e == epoch - 1}, epoch: made}
        return self._epochs[epoch]

    def _assemble(self, epoch: _Epoch, index: int) -> Window:
        begin = int(epoch.starts[index])
        end = min(begin + self.seq_length, int(epoch.borders[-1]))
        first = int(np.searchsorted(epoch.borders, begin, side="right")) - 1
        last = int(np.searchsorted(epoch.borders, end, side="left")) - 1
        slots = epoch.borders[first : last + 1]
        offsets = np.maximum(begin - slots, 0)  # tokens of each piece's document that came before
        piece_starts = np.maximum(slots - begin, 0)
        piece_stops = np.append(piece_starts[1:], end - begin)
        documents = epoch.order[first : last + 1].copy()
        tokens = np.full(self.seq_length, self.anchor_token, dtype=np.int64)
        for document, offset, start, stop in zip(documents.tolist(), offsets.tolist(), piece_starts.tolist(),
                                                 piece_stops.tolist(), strict=True):  # fmt: skip
            tokens[start + 1 : stop] = self.documents.tokens(document, offset, offset + stop - start - 1)
        if piece_stops[-1] - piece_starts[-1] == 1:  # an anchor for which no token was left
            documents[-1] = -1
        if end - begin < self.seq_length:  # the epoch is over
            piece_starts, offsets = np.append(piece_starts, end - begin), np.append(offsets, 0)
            documents = np.append(documents, -1)
        labels, loss_mask = self._labels(tokens, piece_starts, documents, offsets)
        cu_seqlens = np.append(piece_starts, self.seq_length)
        return Window(tokens, labels, loss_mask, cu_seqlens, documents, offsets)

    def _labels(
        self, tokens: np.ndarray, starts: np.ndarray, documents: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = np.append(tokens[1:], 0)
        loss_mask = np.ones(tokens.size, dtype=bool)
        loss_mask[starts] = self.anchor_loss & (offsets == 0)
        loss_mask[np.append(starts[1:], tokens.size) - 1] = False
        padding = documents < 0
        if padding[-1]:
            loss_mask[starts[-1] :] = False
        else:  # the window's end may cut its last document, whose next token is then still the label
            document, consumed = int(documents[-1]), int(offsets[-1] + tokens.size - starts[-1] - 1)
            if consumed < self.documents.lengths[document]:
                labels[-1] = self.documents.tokens(document, consumed, consumed + 1)[0]
                loss_mask[-1] = True
        labels[~loss_mask] = 0
        return labels, loss_mask

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


def _window_starts(borders: np.ndarray, seq_length: int) -> np.ndarray:
    """First slot of every window; see the file's opening."""
    total, at, parts = int(borders[-1]), 0, []
    while at < total:
        guess = at + np.arange(min(_BLOCK, (total - at) // (seq_length - 1) + 1)) * (seq_length - 1)
        guess = guess[guess < total]
        ends = guess + seq_length
        on_border = borders[np.minimum(np.searchsorted(borders, ends), borders.size - 1)] == ends
        stop = int(np.argmax(on_border)) if on_border.any() else guess.size - 1
        parts.append(guess[: stop + 1])
        at = int(ends[stop]) - (0 if on_border[stop] else 1)
    return np.concatenate(parts)
