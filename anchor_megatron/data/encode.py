"""Batches of records to token ids: what a preprocessing worker runs.

A long text goes through the tokenizer in pieces, as its library takes over a hundred times it in memory.
Where to cut is asked of the tokenizer itself: at the end of a line, where the 2,000 characters about it give
the same tokens cut and whole. A tokenizer that splits text into words first (byte-level BPE ones do) gives
the same tokens for the whole text then, as no token reaches over such a place; one that does not (Llama-2's)
never agrees, and its texts are encoded whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anchor_megatron.data.records import Form, Record, Unusable, documents
from anchor_megatron.data.tokenizer import batch_encoder

__all__ = ["Batch", "Encoded", "Encoder", "pieces"]

PIECE = 1 << 19  # characters
_LIKELY = re.compile(r"\w(?=\n)|\S\n(?=\S)")  # behind a line's last word, before one at its margin
_AROUND, _TRIES = 1000, 20  # characters on each side of a cut, places tried for one
TokensOf = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Batch:
    """Records that go to a worker together; with the last of some files, how many files are done then."""

    records: list[Record]
    files_done: int | None = None


@dataclass(frozen=True)
class Encoded:
    """A batch of documents as token ids.

    ids      [tokens] of all documents, one after another, in the data set's dtype
    lengths  int64 [documents], those without tokens left out
    sources  of each document; None where it has none
    empty    documents left out
    skipped  (kind, message) of each record that cannot be used
    size     bytes of the records
    """

    ids: np.ndarray
    lengths: np.ndarray
    sources: list[str | None]
    empty: int
    skipped: list[tuple[str, str]]
    size: int
    files_done: int | None


@dataclass(frozen=True)
class Encoder:
    """Encodes batches.

    tokens_of   texts to token ids
    vocab_size  ids that come as such are below it
    end         what ends every document; one that came as ids and ends with it already is left alone
    skip        unusable records are counted; else they are raised
    """

    tokens_of: TokensOf
    form: Form
    dtype: np.dtype
    vocab_size: int
    end: tuple[int, ...] = ()
    skip: bool = False

    @classmethod
    def open(
        cls,
        source: str | Path,
        form: Form,
        dtype: np.dtype,
        vocab_size: int,
        end: tuple[int, ...],
        skip: bool,
    ) -> Encoder:
        """The encoder of tokenizer.encoder_source's `source`."""
        return cls(batch_encoder(source), form, dtype, vocab_size, end, skip)

    def __call__(self, batch: Batch) -> Encoded:
        found: list[tuple[str | np.ndarray, str | None]] = []
        skipped: list[tuple[str, str]] = []
        for record in batch.records:
            try:
                own = documents(record, self.form)
                self._check_ids(record, own)
            except Unusable as error:
                if not self.skip:
                    raise
                skipped.append((error.kind, str(error)))
            else:
                found += own
        rows = self._encoded([content for content, _ in found])
        kept = [n for n, row in enumerate(rows) if row.size]
        return Encoded(
            ids=np.concatenate([np.zeros(0, self.dtype), *(rows[n] for n in kept)]),
            lengths=np.array([rows[n].size for n in kept], dtype=np.int64),
            sources=[found[n][1] for n in kept],
            empty=len(rows) - len(kept),
            skipped=skipped,
            size=sum(record.size for record in batch.records),
            files_done=batch.files_done,
        )

    def _check_ids(self, record: Record, own: list[tuple[str | np.ndarray, str | None]]) -> None:
        for ids, _ in own:
            if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                worst = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise Unusable(
                    "token id",
                    f"{record.place}: got token id {worst}, expected ids from 0 and below {self.vocab_size}",
                )

    def _encoded(self, contents: list[str | np.ndarray]) -> list[np.ndarray]:
        """Token ids of every document, with what ends it; none of one without text."""
        rows = [np.zeros(0, self.dtype)] * len(contents)
        short: dict[int, str] = {}
        for n, content in enumerate(contents):
            if isinstance(content, np.ndarray):
                rows[n] = self._ended(content)
            elif not content or content.isspace():
                continue
            elif len(content) > PIECE:
                parts = pieces(content, self.tokens_of)
                ids = [np.array(self.tokens_of([part])[0], self.dtype) for part in parts]
                rows[n] = self._ended(np.concatenate(ids))
            else:
                short[n] = content
        for n, found in zip(short, self.tokens_of(list(short.values())), strict=True):
            rows[n] = self._ended(np.array(found, self.dtype))
        return rows

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        ends = bool(self.end) and ids.size > 0 and int(ids[-1]) != self.end[-1]
        return np.append(ids, self.end).astype(self.dtype) if ends else ids.astype(self.dtype, copy=False)


def pieces(text: str, tokens_of: TokensOf, *, size: int = PIECE) -> Iterator[str]:
    """`text` in pieces of about `size` characters whose tokens, one after another, are the whole text's; of
    more where the tokenizer gives no place to cut.
    """
    start, search = 0, size
    while len(text) - search > size // 4:
        at = _place_to_cut(text, search, tokens_of)
        if at is None:
            search += size
            continue
        yield text[start:at]
        start, search = at, at + size
    yield text[start:]


def _place_to_cut(text: str, search: int, tokens_of: TokensOf) -> int | None:
    """The first likely place from `search` on that changes no token."""
    for found in itertools.islice(_LIKELY.finditer(text, search), _TRIES):
        at = found.end()
        before, behind = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
        whole, first, second = tokens_of([before + behind, before, behind])
        if whole == first + second:
            return at
    return None
