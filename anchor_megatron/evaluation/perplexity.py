"""Loss by position on long documents, read whole and through a sliding window, and on short ones.

    whole     anchor t1 ... tS             a token sees everything before it
    sliding   windows of W, a stride of W/2   a token sees at least W/2 tokens before it, and never position W
    short     the first W tokens of documents  what the model could do before it was extended

If a model uses its long context, "whole" falls with the position and stays below "sliding"; where positions
break down it rises above. Positions are counted in buckets that double: [0, 256), [256, 512), [512, 1024) ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchor_megatron.evaluation.reader import Reader

__all__ = ["LossByPosition", "loss_by_position", "position_buckets", "short_loss"]

_FIRST_BUCKET = 256


@dataclass(frozen=True)
class LossByPosition:
    """Mean loss (nats a token) in every bucket [start, stop) of positions."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    whole: tuple[float, ...]
    sliding: tuple[float, ...]


def position_buckets(length: int) -> np.ndarray:
    """Borders of the buckets of `length` positions, int64 [buckets + 1]."""
    borders = [0]
    while borders[-1] < length:
        borders.append(min(length, max(_FIRST_BUCKET, 2 * borders[-1])))
    return np.array(borders)


def loss_by_position(
    reader: Reader, documents: Sequence[np.ndarray], *, length: int, window: int, anchor: int
) -> LossByPosition:
    """Over the first `length` - 1 tokens of every document, behind an anchor. `length` and `window` (even, at
    most `length`) are multiples of the context-parallel ranks. ValueError for a document that is too short.
    """
    if window % 2 or not 2 <= window <= length:
        raise ValueError(f"window: got {window}, expected an even number from 2 to {length}")
    whole, sliding = np.zeros(length - 1), np.zeros(length - 1)
    for document in documents:
        if document.size < length - 1:
            raise ValueError(f"document: got {document.size} tokens, expected at least {length - 1}")
        tokens = np.concatenate([[anchor], document[: length - 1]])
        whole += reader.losses(tokens, np.array([0, length]))[:-1]
        sliding += _sliding(reader, tokens, window=window, anchor=anchor)
    borders = position_buckets(length - 1)
    pairs = list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))
    return LossByPosition(
        start=tuple(begin for begin, _ in pairs),
        stop=tuple(end for _, end in pairs),
        whole=tuple(float(whole[begin:end].mean()) / len(documents) for begin, end in pairs),
        sliding=tuple(float(sliding[begin:end].mean()) / len(documents) for begin, end in pairs),
    )


def short_loss(reader: Reader, documents: Sequence[np.ndarray], *, window: int, anchor: int) -> float:
    """Mean loss of the first `window` - 1 tokens of documents that have as many."""
    chosen = [document[: window - 1] for document in documents if document.size >= window - 1]
    if not chosen:
        raise ValueError(f"documents: got none of {window - 1} tokens or more, expected one at least")
    losses = [
        reader.losses(np.concatenate([[anchor], tokens]), np.array([0, window]))[:-1] for tokens in chosen
    ]
    return float(np.mean(losses))


def _sliding(reader: Reader, tokens: np.ndarray, *, window: int, anchor: int) -> np.ndarray:
    """Loss of every token but the first (S-1), from windows that start half a window after each other."""
    found = np.full(tokens.size - 1, np.nan)
    half, starts = window // 2, [0]
    while starts[-1] + window < tokens.size:
        starts.append(min(starts[-1] + half, tokens.size - window))
    packed = [np.concatenate([[anchor], tokens[start + 1 : start + window]]) for start in starts]
    borders = np.arange(len(starts) + 1) * window
    losses = reader.losses(np.concatenate(packed), borders).reshape(len(starts), window)[:, :-1]
    for start, row in zip(starts, losses, strict=True):
        fresh = 0 if start == 0 else half - 1
        # the last window may overlap more than half; what is there stays
        place = found[start : start + window - 1]
        new = np.isnan(place)
        new[:fresh] = False
        place[new] = row[new]
    assert not np.isnan(found).any(), "a token was left without a loss"
    return found
