"""Tokenised documents on disk, in Megatron's indexed format, with a summary beside them.

    prefix.bin     token ids, one document after another        prefix.idx    where each begins
    prefix.json    what preprocessing counted and chose: documents, tokens, vocabulary, anchor token
    prefix_sources.npy    the source of each document, by its place among prefix.json's; not every set has it

Documents are stored without anchors; packing adds them. Three documents "5 6 7", "8 9" and "4" of two-byte
tokens make a .bin of 12 bytes, `lengths` 3 2 1, and `tokens([2, 0], [0, 1], [1, 3])` gives 4 6 7.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anchor_megatron.data.index import Index, in_parts

__all__ = ["Documents", "Summary", "tokenizer_folder"]


@dataclass(frozen=True)
class Summary:
    """What `prefix.json` holds. Lengths are in tokens."""

    documents: int
    tokens: int
    longest: int
    empty: int
    """Documents without text, which were left out."""
    largest_token: int
    vocab_size: int
    anchor_token: int
    tokenizer: str
    """Folder of the tokenizer, relative to the summary's."""
    sources: list[str]
    """Names that PREFIX_sources.npy numbers; none where documents have no source."""
    skipped: int = 0
    """Records that could not be used and were left out (PREFIX_skipped.json says why)."""
    crc32: int | None = None
    """Of all bytes of the .bin; null where it was not noted."""

    def write(self, path: Path) -> None:
        """Writes the summary as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Reads what `write` wrote; ValueError naming the file and the fields that are missing or unknown."""
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        expected = {entry.name for entry in dataclasses.fields(cls)}
        got = set(values) if isinstance(values, dict) else set()
        if expected != got:
            raise ValueError(f"{path}: got fields {sorted(got)}, expected {sorted(expected)}")
        kinds: dict[str, Any] = {"int": int, "int | None": int | None, "str": str, "list[str]": list}
        for entry in dataclasses.fields(cls):
            if not isinstance(values[entry.name], kinds[str(entry.type)]):
                raise ValueError(f"{path}: {entry.name}: got {values[entry.name]!r}, expected {entry.type}")
        return cls(**values)


def tokenizer_folder(prefix: str | Path) -> Path:
    """Where the tokenizer of the data set at `prefix` lies."""
    name = Summary.read(Path(f"{prefix}.json")).tokenizer
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{prefix}.json: tokenizer: got {name}, expected a folder beside the file")
    return Path(prefix).parent / name


class Documents:
    """The documents under a prefix. Opening reads sources and the ends of the index; all else is mapped, and
    looked at when it is used: the index as a whole when `lengths` are first asked for, a document's ids when
    it is read. `check.py` looks at everything.

    lengths           integers [documents], in tokens
    document_sources  integers [documents], entries of summary.sources; None where the set has none
    index             the .idx file

    `vocab_size` is the model's; ids are checked against it (the tokenizer's where None), all of them by the
    summary on opening and those that are read once more. Raises ValueError naming the file for what is
    missing, truncated, empty or beyond.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int | None = None) -> None:
        self.prefix = str(prefix)
        for suffix in (".bin", ".idx", ".json"):
            if not os.path.isfile(self.prefix + suffix):
                raise ValueError(
                    f"data.train: {self.prefix}{suffix}: no such file; expected a data set's prefix"
                )
        self.summary = Summary.read(Path(self.prefix + ".json"))
        self._id_limit = self.summary.vocab_size if vocab_size is None else vocab_size
        if self.summary.largest_token >= self._id_limit:
            raise ValueError(
                f"{self.prefix}.bin: got token id {self.summary.largest_token}, expected ids below "
                f"vocab_size = {self._id_limit}"
            )
        self._open()

    def _open(self) -> None:
        self.index = index = Index(self.prefix + ".idx")
        size, expected = os.path.getsize(self.prefix + ".bin"), index.bytes
        if size != expected:
            raise ValueError(
                f"{self.prefix}.bin: got {size} bytes, expected the {expected} that the index counts"
            )
        if not expected:
            raise ValueError(f"{self.prefix}.bin: got no tokens, expected at least one document")
        self._tokens = np.asarray(np.memmap(self.prefix + ".bin", dtype=index.dtype, mode="r"))
        counted, told = (len(self), self._tokens.size), (self.summary.documents, self.summary.tokens)
        if counted != told:
            raise ValueError(
                f"{self.prefix}.json: got {told[0]} documents of {told[1]} tokens, expected {counted[0]} of "
                f"{counted[1]} as the index beside it counts: they are of different data sets"
            )
        self.document_sources = self._read_sources()

    def _read_sources(self) -> np.ndarray | None:
        path, names = self.prefix + "_sources.npy", self.summary.sources
        if not os.path.isfile(path):
            return None
        try:
            found = np.asarray(np.lib.format.open_memmap(path, mode="r"))  # allocates nothing
        except Exception as error:  # a damaged header raises almost anything
            raise ValueError(f"{path}: expected an array in numpy's format, got {error!r}") from error
        if (
            found.shape != (len(self),)
            or found.dtype.kind not in "iu"
            or not all(0 <= part.min() and part.max() < len(names) for _, part in in_parts(found))
        ):
            raise ValueError(
                f"{path}: got {found.dtype} {found.shape}, expected for each of {len(self)} documents an "
                f"entry of the {len(names)} sources in {self.prefix}.json"
            )
        return found

    @property
    def lengths(self) -> np.ndarray:
        """As the index's; ValueError naming it, and a document, where it does not hold together."""
        return self.index.lengths

    def __len__(self) -> int:
        return self.index.documents

    def tokens(self, documents: ArrayLike, starts: ArrayLike, stops: ArrayLike) -> np.ndarray:
        """Tokens [start, stop) of one document or of several, one after another: int64 [sum of lengths].

        ValueError naming file and document for an id that is no token.
        """
        chosen, begins, ends = (np.atleast_1d(values) for values in (documents, starts, stops))
        counts = ends - begins
        firsts = np.cumsum(counts) - counts
        places = np.repeat(self.index.starts(chosen) + begins - firsts, counts)
        places += np.arange(places.size)
        found = self._tokens[places].astype(np.int64)
        unsigned = found.view(np.uint64)  # in which a negative id is a large one
        if unsigned.size and unsigned.max() >= self._id_limit:
            worst = int(np.argmax(unsigned))
            document = chosen[np.searchsorted(firsts, worst, side="right") - 1]
            raise ValueError(
                f"{self.prefix}.bin: document {document}: got token id {found[worst]}, expected ids from 0 "
                f"and below vocab_size = {self._id_limit}"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "summary": self.summary, "_id_limit": self._id_limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
