"""Tokenised documents on disk, in Megatron's indexed format, with a summary beside them.

    prefix.bin     token ids, one document after another        prefix.idx    where each begins
    prefix.json    what preprocessing counted and chose: documents, tokens, vocabulary, anchor token

Documents are stored without anchors; packing adds them.
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

__all__ = ["Documents", "Summary"]

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders


@dataclass(frozen=True)
class Summary:
    """What `prefix.json` holds. Lengths are in tokens."""

    documents: int
    tokens: int
    longest: int
    empty: int
    largest_token: int
    vocab_size: int
    anchor_token: int
    tokenizer: str
    """Folder of the tokenizer, relative to the summary."""

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
        expected, got = {entry.name for entry in dataclasses.fields(cls)}, set(values)
        if expected != got:
            raise ValueError(f"{path}: got fields {sorted(got)}, expected {sorted(expected)}")
        return cls(**values)


class Documents:
    """The documents under a prefix. Opening reads the index alone; tokens are mapped, not loaded.

    Raises ValueError naming the file for what is missing, truncated, empty or beyond `vocab_size`.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int | None = None) -> None:
        self.prefix = str(prefix)
        for suffix in (".bin", ".idx", ".json"):
            if not os.path.isfile(self.prefix + suffix):
                raise ValueError(
                    f"data.train: {self.prefix}{suffix}: no such file; expected a data set's prefix"
                )
        self.summary = Summary.read(Path(self.prefix + ".json"))
        if vocab_size is not None and self.summary.largest_token >= vocab_size:
            raise ValueError(
                f"{self.prefix}.bin: got token id {self.summary.largest_token}, expected ids below the "
                f"model's vocab_size = {vocab_size}"
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
        self._tokens = np.memmap(self.prefix + ".bin", dtype=self._dtype, mode="r")
        self.lengths = np.diff(self._starts)

    def __len__(self) -> int:
        return self.lengths.size

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, a view of the mapped file in its own dtype."""
        begin = self._starts[document]
        return self._tokens[begin + start : begin + stop]

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "summary": self.summary}

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
    if version != 1 or code not in {one.value for one in DType} or size != expected or borders < 1:
        raise ValueError(
            f"{path}: got {size} bytes, version {version}, dtype code {code}; expected {expected} bytes for "
            f"the {sequences} sequences its header counts, version 1"
        )
    lengths = np.fromfile(path, dtype=np.int32, count=sequences, offset=_HEADER.size)
    where = np.fromfile(path, dtype=np.int64, count=borders, offset=_HEADER.size + sequences * 12)
    if (lengths < 0).any() or where[0] != 0 or where[-1] != sequences or (np.diff(where) < 0).any():
        raise ValueError(f"{path}: document borders do not rise from 0 to its {sequences} sequences")
    return np.dtype(DType.dtype_from_code(code)), lengths, where
