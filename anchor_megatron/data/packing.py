"""Documents packed into windows; any window of any epoch can be asked for directly.

    seed, epoch -> order of documents -> Stream    -> pieces of a window -> Window
                   recipe.py             stream.py    arrange.py            assemble.py

Plain packing lays documents end to end, each behind an anchor, and cuts them where a window is full; what is
cut goes on behind an anchor of its own. Two documents of 3 and 4 tokens, windows of 5:

    window 0   a x y z a     the last slot holds an anchor alone: padding
    window 1   a p q r s

Windows of 4 would be a x y z | a p q r | a s . . (padding, as the epoch is over). With `Packing.shuffle` an
epoch's windows come in random order, as a long document's would fill whole batches. `Packing.kind` may look
ahead (arrange.py) over blocks of windows, and `interleave` shuffles chunks inside a window (interleave.py).

Every token of every document that an epoch takes appears once in it, and every token but a document's first
is a label once. A window is a function of (documents, options, seed, its number) alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anchor_megatron.data.arrange import arrange
from anchor_megatron.data.assemble import Labels, Leads, assemble, ranges
from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.interleave import interleaved_slots
from anchor_megatron.data.recipe import Recipe, make_groups
from anchor_megatron.data.seeds import INTERLEAVE, REPACK, SHUFFLE, generator
from anchor_megatron.data.stream import Pieces, Stream, lay_out
from anchor_megatron.data.window import Window

__all__ = ["Packing", "WindowDataset"]


@dataclass(frozen=True)
class Packing:
    """How documents fill windows.

    kind           plain, best_fit or balanced; the others rearrange blocks of `lookahead` global batches of
    batch_windows  windows each
    most_units     documents a window at most; None: as many as fit
    shortest       documents of fewer tokens are left out, or
    join_short     joined to units of at least as many
    interleave     mean tokens of the chunks that are shuffled in a window; 0: documents stay whole
    shuffle        plain: an epoch's windows in random order, not in that of the documents they are cut from
    """

    kind: str = "plain"
    lookahead: int = 8
    batch_windows: int = 1
    most_units: int | None = None
    shortest: int = 0
    join_short: bool = False
    interleave: int = 0
    shuffle: bool = False


class WindowDataset:
    """Windows of `seq_length` tokens, anchors included, over endless epochs."""

    def __init__(
        self,
        documents: Documents | Corpus,
        *,
        seq_length: int,
        anchor_token: int,
        seed: int,
        labels: Labels = Labels(),  # noqa: B008
        packing: Packing = Packing(),  # noqa: B008
        tags: list[list[int]] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """`tags`: tokens behind the anchor, of every source of the corpus. `recipe`: the documents' order; of
        all documents, shuffled, where None.

        ValueError where a window could not hold an anchor, a tag and a token, or all documents are too short.
        """
        self.corpus = documents if isinstance(documents, Corpus) else Corpus([documents])
        self.leads, self.labels, self.packing = Leads(anchor_token, tags), labels, packing
        longest_lead = int(self.leads.lengths.max())
        if seq_length <= longest_lead:
            what = "an anchor and a token" if tags is None else "an anchor, the longest tag and a token"
            raise ValueError(
                f"data.seq_length: got {seq_length}, expected at least {longest_lead + 1} ({what})"
            )
        self.seq_length, self.seed = seq_length, seed
        self.recipe = recipe or Recipe(
            make_groups(self.corpus, weights=[1.0] * len(self.corpus.sets)), seed=seed
        )
        longest = max(int(self.corpus.lengths[group.documents].max()) for group in self.recipe.groups)
        if longest < packing.shortest and not packing.join_short:
            raise ValueError(
                f"data.min_document_tokens: got {packing.shortest}, expected at most {longest}, which the "
                "longest document holds"
            )
        self._streams: dict[int, Stream] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._blocks: dict[tuple[int, int], list[Pieces]] = {}
        self._first_windows = [0]  # of epochs 0, 1, ...; grows as later ones are asked for

    def __getitem__(self, n: int) -> Window:
        epoch, index = self.locate(n)
        stream = self._stream(epoch)
        if self.packing.shuffle and self.packing.kind == "plain":
            index = int(self._shuffled(epoch)[index])
        pieces = self._pieces(epoch, index)
        window = assemble(
            self.corpus, stream, pieces, seq_length=self.seq_length, leads=self.leads, labels=self.labels
        )
        passed = np.searchsorted(stream.dropped, stream.windows[index : index + 2], side="right")
        passed[0] *= index > 0  # those before an epoch's first token are the first window's
        window = replace(window, counts=replace(window.counts, dropped=int(passed[1] - passed[0])))
        return self._interleaved(window, stream.leads[pieces.unit], n) if self.packing.interleave else window

    def locate(self, n: int) -> tuple[int, int]:
        """(epoch, window within it) of window `n` >= 0."""
        while n >= self._first_windows[-1]:
            epoch = len(self._first_windows) - 1
            self._first_windows.append(self._first_windows[-1] + self.windows_per_epoch(epoch))
        epoch = int(np.searchsorted(self._first_windows, n, side="right")) - 1
        return epoch, n - self._first_windows[epoch]

    def windows_per_epoch(self, epoch: int) -> int:
        """Windows of an epoch; it varies a little, as documents are cut at other places."""
        return self._stream(epoch).windows.size - 1

    def _stream(self, epoch: int) -> Stream:
        if epoch not in self._streams:
            made = lay_out(
                self.corpus,
                self.recipe.order(epoch),
                seq_length=self.seq_length,
                leads=self.leads.lengths,
                shortest=self.packing.shortest,
                join=self.packing.join_short,
                most_units=self.packing.most_units,
            )
            self._streams = {e: kept for e, kept in self._streams.items() if e == epoch - 1} | {epoch: made}
        return self._streams[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The windows of `epoch`, int64, as they are shown."""
        if epoch not in self._orders:
            drawn = generator(self.seed, SHUFFLE, epoch).permutation(self.windows_per_epoch(epoch))
            self._orders = {e: kept for e, kept in self._orders.items() if e == epoch - 1} | {epoch: drawn}
        return self._orders[epoch]

    def _pieces(self, epoch: int, index: int) -> Pieces:
        """The pieces of window `index` of `epoch`."""
        if self.packing.kind == "plain":
            return self._plain(epoch, index)
        size = self.packing.lookahead * self.packing.batch_windows
        first = self._first_windows[epoch]
        number = (first + index) // size
        begin = max(number * size - first, 0)
        if (epoch, number) not in self._blocks:
            end = min((number + 1) * size - first, self.windows_per_epoch(epoch))
            kept = list(self._blocks.items())[-1:]
            self._blocks = dict([*kept, ((epoch, number), self._arranged(epoch, begin, end))])
        return self._blocks[epoch, number][index - begin]

    def _plain(self, epoch: int, index: int) -> Pieces:
        stream = self._stream(epoch)
        return stream.pieces(*stream.windows[index : index + 2].tolist())

    def _arranged(self, epoch: int, begin: int, end: int) -> list[Pieces]:
        """Windows [begin, end) of an epoch, which lie in one block."""
        stream, first = self._stream(epoch), self._first_windows[epoch]
        pieces = stream.pieces(int(stream.windows[begin]), int(stream.windows[end]))
        batch = (np.arange(begin, end) + first) // self.packing.batch_windows
        found = arrange(
            self.packing.kind,
            pieces,
            stream.leads[pieces.unit],
            batches=np.unique(batch, return_counts=True)[1].tolist(),
            seq_length=self.seq_length,
            most_units=self.packing.most_units,
            generator=generator(self.seed, REPACK, first + begin),
        )
        return found or [self._plain(epoch, index) for index in range(begin, end)]

    def _interleaved(self, window: Window, leads: np.ndarray, n: int) -> Window:
        is_own = np.zeros(self.seq_length, dtype=bool)
        borders = window.cu_seqlens[: leads.size + 1]
        is_own[ranges(borders[:-1] + leads, borders[1:])] = True
        slots = interleaved_slots(
            window.cu_seqlens,
            is_own,
            filled=self.seq_length - window.counts.padding,
            mean=self.packing.interleave,
            generator=generator(self.seed, INTERLEAVE, n),
        )
        return replace(window, slots=slots)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}, "_orders": {}, "_blocks": {}}
