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
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import ArrayLike

__all__ = ["Documents", "Summary", "tokenizer_folder"]

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
_INTEGERS = {one.value for one in DType if np.issubdtype(DType.dtype_from_code(one.value), np.integer)}


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
    """Names of the inputs."""

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
        kinds = {"int": int, "str": str, "list[str]": list}
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
    """The documents under a prefix. Opening reads the index alone; tokens are mapped, not loaded.

    lengths           int64 [documents], in tokens
    document_sources  integers [documents], entries of summary.sources; None where the set has none

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
        self._dtype, sequence_lengths, borders = _read_index(self.prefix + ".idx")
        ends = np.concatenate([[0], np.cumsum(sequence_lengths, dtype=np.int64)])
        self._starts = ends[borders]
        size, expected = os.path.getsize(self.prefix + ".bin"), int(ends[-1]) * self._dtype.itemsize
        if size != expected:
            raise ValueError(
                f"{self.prefix}.bin: got {size} bytes, expected the {expected} that the index counts"
            )
        if not expected:
            raise ValueError(f"{self.prefix}.bin: got no tokens, expected at least one document")
        self._tokens = np.asarray(np.memmap(self.prefix + ".bin", dtype=self._dtype, mode="r"))
        self.lengths = np.diff(self._starts)
        self.document_sources = self._read_sources()
        counted, told = (len(self), int(ends[-1])), (self.summary.documents, self.summary.tokens)
        if counted != told:
            raise ValueError(
                f"{self.prefix}.json: got {told[0]} documents of {told[1]} tokens, expected {counted[0]} of "
                f"{counted[1]} as the index beside it counts: they are of different data sets"
            )

    def _read_sources(self) -> np.ndarray | None:
        path, names = self.prefix + "_sources.npy", self.summary.sources
        if not os.path.isfile(path):
            return None
        found = np.load(path)
        if found.shape != (len(self),) or found.dtype.kind not in "iu" or found.max(initial=0) >= len(names):
            raise ValueError(
                f"{path}: got {found.dtype} {found.shape}, expected for each of {len(self)} documents an "
                f"entry of the {len(names)} sources in {self.prefix}.json"
            )
        return found

    def __len__(self) -> int:
        return self.lengths.size

    def tokens(self, documents: ArrayLike, starts: ArrayLike, stops: ArrayLike) -> np.ndarray:
        """Tokens [start, stop) of one document or of several, one after another: int64 [sum of lengths].

        ValueError naming file and document for an id that is no token.
        """
        chosen, begins, ends = (np.atleast_1d(values) for values in (documents, starts, stops))
        counts = ends - begins
        firsts = np.cumsum(counts) - counts
        places = np.repeat(self._starts[chosen] + begins - firsts, counts)
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


def _read_index(path: str) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Token dtype, sequence lengths int32 [n] and document borders int64 [documents + 1] of an .idx file.

    Checked before anything is allocated: a header may claim any size.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(b"MMIDIDX\x00\x00"):
        raise ValueError(f"{path}: got {head[:9]!r}, expected an index of Megatron's format (MMIDIDX)")
    _, version, code, sequences, borders = _HEADER.unpack(head)
    expected = _HEADER.size + sequences * (4 + 8) + borders * 8
    if version != 1 or code not in _INTEGERS or size != expected or borders < 1:
        raise ValueError(
            f"{path}: got {size} bytes, version {version}, dtype code {code}; expected {expected} bytes for "
            f"the {sequences} sequences its header counts, version 1, integers"
        )
    lengths = np.fromfile(path, dtype=np.int32, count=sequences, offset=_HEADER.size)
    where = np.fromfile(path, dtype=np.int64, count=borders, offset=_HEADER.size + sequences * 12)
    if (lengths < 0).any() or where[0] != 0 or where[-1] != sequences or (np.diff(where) < 0).any():
        raise ValueError(f"{path}: document borders do not rise from 0 to its {sequences} sequences")
    return np.dtype(DType.dtype_from_code(code)), lengths, where
