"""Several data sets as one: their documents numbered through, each with the source it is from.

    sets of 3 and 2 documents     documents 0 1 2 | 3 4
    sources                       web code web | notes notes     a set that names none is one source: itself

Splits are by document, and the same in every run: a fixed shuffle of each set's documents, of which the first
share is for training, the next for validation, the last for testing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from anchor_megatron.data.documents import Documents

__all__ = ["SPLITS", "Corpus"]

SPLITS = ("train", "valid", "test")
_SPLIT_SEED = 0x5917  # of no run: a document stays in its split whatever the seed


class Corpus:
    """The documents of `sets`, one data set after another.

    lengths       integers [documents], in tokens
    sources       integers [documents], each document's entry in `source_names`
    source_names  of all sets; one name is one source, whichever set it stands in

    ValueError where the sets were made for different anchors or vocabularies.
    """

    def __init__(self, sets: Sequence[Documents]) -> None:
        self.sets = tuple(sets)
        for field in ("anchor_token", "vocab_size"):
            found = {getattr(one.summary, field) for one in self.sets}
            if len(found) > 1:
                raise ValueError(
                    f"data.train: got data sets of different {field} {sorted(found)}, expected them of one "
                    "tokenizer"
                )
        self.summary = self.sets[0].summary
        self._firsts = np.cumsum([0, *(len(one) for one in self.sets)])
        self.lengths = _joined([one.lengths for one in self.sets])
        self.source_names, self.sources = _sources(self.sets)

    def __reduce__(self) -> tuple[type[Corpus], tuple[Sequence[Documents]]]:
        return Corpus, (self.sets,)  # workers open the index themselves

    def __len__(self) -> int:
        return self.lengths.size

    def members(self, number: int) -> range:
        """Documents of the data set `number`."""
        return range(self._firsts[number], self._firsts[number + 1])

    def split(self, number: int, shares: Sequence[float], name: str) -> np.ndarray:
        """Documents, ascending, of set `number` in the split `name`; `shares` of SPLITS sum to 1."""
        of = SPLITS.index(name)
        begin, end = sum(shares[:of]), sum(shares[: of + 1])
        every = self.members(number)
        size = len(every)
        first, last = (round(share / sum(shares) * size) for share in (begin, end))
        numbers = np.arange(every.start, every.stop, dtype=_dtype_of(len(self)))
        if last - first == size:
            return numbers
        np.random.Generator(np.random.Philox(_SPLIT_SEED)).shuffle(numbers)
        return np.sort(numbers[first:last])

    def tokens(self, documents: ArrayLike, starts: ArrayLike, stops: ArrayLike) -> np.ndarray:
        """As `Documents.tokens`."""
        if len(self.sets) == 1:
            return self.sets[0].tokens(documents, starts, stops)
        chosen, begins, ends = (np.atleast_1d(values) for values in (documents, starts, stops))
        counts = ends - begins
        firsts = np.cumsum(counts) - counts
        found = np.empty(int(counts.sum()), dtype=np.int64)
        owner = np.searchsorted(self._firsts, chosen, side="right") - 1
        for number in np.unique(owner):
            own = np.flatnonzero(owner == number)
            places = np.repeat(firsts[own] - np.cumsum(counts[own]) + counts[own], counts[own])
            places += np.arange(places.size)
            found[places] = self.sets[number].tokens(
                chosen[own] - self._firsts[number], begins[own], ends[own]
            )
        return found


def _dtype_of(count: int) -> type[np.signedinteger]:
    """Of numbers below `count`: of 100 million documents one array is 400 MB, not 800."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _sources(sets: Sequence[Documents]) -> tuple[list[str], np.ndarray]:
    own = [
        [os.path.basename(one.prefix)] if one.document_sources is None else one.summary.sources
        for one in sets
    ]
    names = list(dict.fromkeys(name for part in own for name in part))
    entry = {name: np.min_scalar_type(len(names)).type(number) for number, name in enumerate(names)}
    parts = []
    for one, of_set in zip(sets, own, strict=True):
        numbers = np.array([entry[name] for name in of_set])
        if one.document_sources is None:
            parts.append(np.broadcast_to(numbers[0], (len(one),)))
        else:
            parts.append(numbers[one.document_sources])
    return names, _joined(parts)
