"""From pieces of documents to a window's tokens, labels and borders.

A piece is led by the anchor and, where there are tags, by its source's (t). Document 5 6 7 8, of which a
window shows 5 6 7, then the whole document 9:

    tokens      a  t  5  6  7  a  t  9
    labels      .  .  6  7  8  .  .  .      8, the last label, is not shown here: it leads no token twice
    anchor_loss .  5  6  7  8  .  9  .      what leads a document learns its first token
    end_token   .  .  6  7  8  .  .  e      a document's last token learns that it ends
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.stream import Pieces, Stream
from anchor_megatron.data.window import Window, WindowCounts

__all__ = ["Labels", "Leads", "assemble"]


@dataclass(frozen=True)
class Leads:
    """What stands in front of a piece: the anchor, then its source's tag where `tags` has one for each."""

    anchor: int
    tags: Sequence[Sequence[int]] | None = None
    _flat: np.ndarray = field(init=False, repr=False, compare=False)
    _first: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [[self.anchor, *tag] for tag in self.tags or [[]]]
        object.__setattr__(self, "_flat", np.array(sum(rows, []), dtype=np.int64))
        object.__setattr__(self, "_first", np.cumsum([0, *map(len, rows)]))

    @property
    def lengths(self) -> np.ndarray:
        """Slots int64 [sources] of every source's lead; of one entry where there are no tags."""
        return np.diff(self._first)

    def tokens(self, sources: np.ndarray) -> np.ndarray:
        """The leads of pieces from `sources`, one after another."""
        if self.tags is None:
            return np.full(sources.size, self.anchor)
        return self._flat[ranges(self._first[sources], self._first[sources + 1])]


@dataclass(frozen=True)
class Labels:
    """What is trained beside the tokens inside documents: `anchor_loss`: what leads a document predicts its
    first token; `end_token`: what a document's last token predicts, None for nothing.
    """

    anchor_loss: bool = False
    end_token: int | None = None


def assemble(
    corpus: Corpus, stream: Stream, pieces: Pieces, *, seq_length: int, leads: Leads, labels: Labels
) -> Window:
    """The window of `seq_length` tokens that shows `pieces`; what they leave is padding, of anchors."""
    counts, lead = pieces.stop - pieces.start, stream.leads[pieces.unit]
    borders = np.cumsum(np.concatenate([[0], counts + lead]))
    filled = int(borders[-1])
    assert filled <= seq_length, f"got pieces of {filled} slots, expected at most {seq_length}"
    own = ranges(borders[:-1] + lead, borders[1:])  # rows of the documents' own tokens
    first = np.searchsorted(stream.borders, pieces.start, side="right") - 1  # entries of stream.documents
    tokens = np.full(seq_length, leads.anchor, dtype=np.int64)
    found = np.zeros(seq_length, dtype=np.int64)  # labels
    mask = np.zeros(seq_length, dtype=bool)
    tokens[own], found[own], mask[own] = _own_tokens(corpus, stream, pieces, first, labels)
    tokens[ranges(borders[:-1], borders[:-1] + lead)] = leads.tokens(corpus.sources[stream.documents[first]])
    offsets = pieces.start - stream.borders[first]
    if labels.anchor_loss:
        led = borders[:-1][offsets == 0] + lead[offsets == 0]
        found[led - 1], mask[led - 1] = tokens[led], True
    documents = stream.documents[first].astype(np.int64)
    if filled < seq_length:
        borders, documents = np.append(borders, seq_length), np.append(documents, -1)
        offsets = np.append(offsets, 0)
    last = np.searchsorted(stream.borders, pieces.stop, side="left")
    counted = WindowCounts(
        tokens=int(counts.sum()),
        pieces=counts.size,
        tags=int(lead.sum()) - counts.size,
        padding=seq_length - filled,
        cut=int((stream.borders[last] != pieces.stop).sum()),
        joined=int((last - first).sum()) - counts.size,
    )
    return Window(tokens, found, mask, borders, documents, offsets, counted)


def _own_tokens(
    corpus: Corpus, stream: Stream, pieces: Pieces, first: np.ndarray, labels: Labels
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and loss mask of the pieces' own tokens, in order."""
    last = np.searchsorted(stream.borders, pieces.stop, side="left")
    entries = ranges(first, last)
    begin = stream.borders[entries]
    piece = np.repeat(np.arange(first.size), last - first)
    starts = np.maximum(pieces.start[piece], begin) - begin
    stops = np.minimum(pieces.stop[piece], stream.borders[entries + 1]) - begin
    documents = stream.documents[entries]
    goes_on = stops < corpus.lengths[documents]  # one token more than the window shows: its last label
    fetched = corpus.tokens(documents, starts, stops + goes_on)
    ends = np.cumsum(stops + goes_on - starts)
    following = np.roll(fetched, -1)  # the last one's is replaced or not shown
    mask = np.ones(fetched.size, dtype=bool)
    is_last = ends[~goes_on] - 1
    following[is_last] = 0 if labels.end_token is None else labels.end_token
    mask[is_last] = labels.end_token is not None
    shown = np.ones(fetched.size, dtype=bool)
    shown[ends[goes_on] - 1] = False
    return fetched[shown], following[shown], mask[shown]


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """The integers of every [start, stop), one range after another."""
    lengths = stop - start
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(start - offsets, lengths) + np.arange(int(lengths.sum()))
