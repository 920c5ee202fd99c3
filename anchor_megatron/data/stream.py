"""One epoch's documents laid end to end, and where its windows begin.

Coordinates are *own tokens*: what documents hold, without what leads them. A *unit* is what attends to itself
behind one lead (the anchor, and a tag where there are tags): a document, or short ones joined. Documents of 3
and 4 tokens, leads of one slot, windows of 5 slots:

    own tokens      x y z p q r s         units begin at 0 and 3
    window 0        a x y z .             own tokens 0-3; the last slot has room for a lead but no token
    window 1        a p q r s             own tokens 3-7

Windows of 4 would be 0-3, 3-6 and 6-7: a unit that is cut goes on in the next window behind a lead of its
own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_megatron.data.corpus import Corpus

__all__ = ["Pieces", "Stream", "lay_out", "window_starts"]

_BLOCK = 64  # windows whose starts are guessed at once; twice as many after each block that was right


@dataclass(frozen=True)
class Pieces:
    """Own tokens [start, stop) int64 of units, in the order in which a window shows them."""

    unit: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True)
class Stream:
    """An epoch of d documents in u units.

    documents     integers [d] in order; none is empty
    borders       int64 [d+1]  own tokens before each
    unit_borders  int64 [u+1]  own tokens before each unit; `borders` where each document is one
    leads         int64 [u]    slots in front of each piece of a unit
    windows       int64 [w+1]  own tokens before each window of plain packing
    dropped       int64 [x]    own tokens before each document that was left out as too short
    """

    documents: np.ndarray
    borders: np.ndarray
    unit_borders: np.ndarray
    leads: np.ndarray
    windows: np.ndarray
    dropped: np.ndarray

    def pieces(self, start: int, stop: int) -> Pieces:
        """Own tokens [start, stop) by unit."""
        borders = self.unit_borders
        first = int(np.searchsorted(borders, start, side="right")) - 1
        last = int(np.searchsorted(borders, stop, side="left"))
        return Pieces(
            np.arange(first, last),
            np.maximum(borders[first:last], start),
            np.minimum(borders[first + 1 : last + 1], stop),
        )


def lay_out(
    corpus: Corpus,
    order: np.ndarray,
    *,
    seq_length: int,
    leads: np.ndarray,
    shortest: int,
    join: bool,
    most_units: int | None,
) -> Stream:
    """The stream of documents `order`.

    `leads` int64 [sources] are the slots in front of a piece; documents of fewer than `shortest` tokens are
    left out, or with `join` joined, source by source, into units of at least as many; a window holds at most
    `most_units`.
    """
    lengths = corpus.lengths[order]
    is_short = lengths < max(shortest, 1)
    dropped, units = np.zeros(0, dtype=np.int64), None
    if join and (is_short & (lengths > 0)).any():
        order, units = _join(corpus, order[lengths > 0], shortest)
        lengths = corpus.lengths[order]
    elif is_short.any():
        dropped = (np.cumsum(lengths * ~is_short))[is_short & (lengths > 0)]
        order, lengths = order[~is_short], lengths[~is_short]
    borders = _before(lengths)
    del lengths, is_short  # of 100 million documents half a gigabyte, while windows are looked for
    heads = order if units is None else order[units[:-1]]
    if (leads == leads[0]).all():
        own_leads = np.broadcast_to(leads[0], heads.shape)
    else:
        own_leads = leads[corpus.sources[heads]]
    unit_borders = borders if units is None else borders[units]
    windows = window_starts(unit_borders, own_leads, seq_length=seq_length, most_units=most_units)
    return Stream(order, borders, unit_borders, own_leads, windows, dropped)


def _before(lengths: np.ndarray) -> np.ndarray:
    """What lies before each of several things of `lengths`, and before the end: int64 [n+1]."""
    before = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=before[1:])
    return before


def _join(corpus: Corpus, order: np.ndarray, shortest: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents reordered so that short ones of a source lie behind the first of them, and the units' first
    entries int64 [u+1].

    Short documents of a source, in order, are cut into runs where their tokens pass multiples of twice
    `shortest`; each run then has at least `shortest`. What is left at the end joins the run before it.
    """
    lengths, sources = corpus.lengths[order], corpus.sources[order]
    unit = np.arange(order.size, dtype=order.dtype)  # the entry that leads each document's unit
    for source in range(len(corpus.source_names)):
        entries = np.flatnonzero((sources == source) & (lengths < shortest))
        before = np.cumsum(lengths[entries]) - lengths[entries]
        run = before // (2 * shortest)
        if run.size and run[-1] and lengths[entries[run == run[-1]]].sum() < shortest:
            run[run == run[-1]] -= 1
        _, first, which = np.unique(run, return_index=True, return_inverse=True)
        unit[entries] = entries[first][which]
    moved = np.argsort(unit, kind="stable")
    begins = np.flatnonzero(np.diff(unit[moved], prepend=-1))
    return order[moved], np.append(begins, order.size)


def window_starts(
    unit_borders: np.ndarray, leads: np.ndarray, *, seq_length: int, most_units: int | None = None
) -> np.ndarray:
    """Own tokens int64 [w+1] before each window of plain packing: units one after another, cut where a
    window is full.

    In slots (own tokens and each unit's lead) a window that ends inside a unit is followed by one that begins
    a lead's length before its end, as the lead is shown again. So windows stride by seq_length - lead, but
    for those that end with a unit, in a lead or at `most_units`. Strides are guessed for a block of windows
    and hold up to the first that is otherwise: where leads are alike, the work grows with the number of such
    ends, not of documents.
    """
    slots = _before(leads)
    slots += unit_borders
    total, at, block, unit = int(slots[-1]), 0, _BLOCK, 0
    parts: list[np.ndarray] = []
    while at < total:
        stride = seq_length - int(leads[unit])
        guess = np.arange(at, min(at + block * stride, total), stride)
        ends = guess + seq_length
        if most_units is not None:
            first = np.searchsorted(slots, guess, side="right") - 1
            ends = np.minimum(ends, slots[np.minimum(first + most_units, leads.size)])
        inside = np.minimum(np.searchsorted(slots, ends, side="right") - 1, leads.size - 1)
        following = np.where(ends < total, np.maximum(slots[inside], ends - leads[inside]), total)
        wrong = following != guess + stride
        hit = bool(wrong.any())
        stop = int(np.argmax(wrong)) if hit else guess.size - 1
        parts.append(guess[: stop + 1])
        at, unit = int(following[stop]), int(inside[stop])
        block = _BLOCK if hit else 2 * block
    begins = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    units = np.searchsorted(slots, begins, side="right") - 1
    return np.append(unit_borders[units] + begins - slots[units], unit_borders[-1])
