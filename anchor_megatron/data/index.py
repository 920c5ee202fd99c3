"""The .idx file of Megatron's indexed format, mapped: opening one of 100 million documents reads a few bytes.

    header                         magic, version, dtype of the tokens, numbers of sequences and of borders
    int32 [sequences]              lengths in tokens
    int64 [sequences]              bytes before each in the .bin
    int64 [documents + 1]          borders: the sequences before each document

Documents "5 6 7", "8 9" and "4" of two-byte tokens, a sequence each: lengths 3 2 1, bytes 0 6 10, borders
0 1 2 3. A document of several sequences is their tokens one after another.

The header may claim anything, and is held against the file's size before the arrays are mapped. Then only
their ends are looked at. Whether all three arrays say the same is asked by `lengths`, once, in parts.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

__all__ = ["Index", "in_parts", "write_index"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
_INTEGERS = {one.value for one in DType if np.issubdtype(DType.dtype_from_code(one.value), np.integer)}
_PART = 1 << 20  # entries looked at together, so that a look at a whole array takes no memory


def in_parts(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first entry, entries) of an array's parts of bounded size."""
    for begin in range(0, array.size, _PART):
        yield begin, array[begin : begin + _PART]


class Index:
    """What an .idx file says; ValueError naming it for what is no index, or not a whole one.

    dtype             of the tokens
    documents         their number
    bytes             that the .bin must have
    sequence_lengths  int32 [n], in tokens
    pointers          int64 [n], bytes before each sequence in the .bin
    borders           int64 [documents + 1], sequences before each document

    Whether the arrays make sense is known once `lengths` have been asked for.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.dtype, sequences, borders = _read_header(path)
        self.documents = borders - 1
        mapped = np.memmap(path, mode="r")
        self._ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * borders]).tolist()
        parts = [mapped[begin:end] for begin, end in zip(self._ends, self._ends[1:], strict=False)]
        self.sequence_lengths = np.asarray(parts[0]).view(np.int32)
        self.pointers, self.borders = (np.asarray(part).view(np.int64) for part in parts[1:])
        if self.borders[0] != 0 or self.borders[-1] != sequences:
            raise ValueError(f"{path}: document borders do not rise from 0 to its {sequences} sequences")
        self.bytes = 0
        if sequences:
            self.bytes = int(self.pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if self.bytes % self.dtype.itemsize:
            raise ValueError(
                f"{path}: got {self.bytes} bytes of tokens, expected a multiple of {self.dtype.itemsize}"
            )

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Lengths of the documents in tokens, integers [documents]: the file's own where every document is a
        sequence, as where there are as many of either. All of the index is looked through; ValueError naming
        the document where lengths, pointers and borders do not say the same.
        """
        self._check_pointers()
        one_each = self.documents == self.sequence_lengths.size
        for begin, part in self._read(2, overlap=1):
            steps = np.diff(part)
            wrong = steps != 1 if one_each else steps < 0
            if wrong.any():
                raise ValueError(
                    f"{self.path}: document {begin + int(np.argmax(wrong))}: got borders that do not rise as "
                    f"those of {self.documents} documents of {self.sequence_lengths.size} sequences"
                )
        if one_each:
            return self.sequence_lengths
        before = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        return np.diff(before[self.borders])

    def _check_pointers(self) -> None:
        """Each sequence begins where the one before it ends, and none is shorter than nothing."""
        before = 0
        for begin, found in self._read(1):
            lengths = self.sequence_lengths[begin : begin + found.size]
            ends = before + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            expected = np.append(before, ends[:-1])
            wrong = (found != expected) | (lengths < 0)
            if wrong.any():
                at = int(np.argmax(wrong))
                document = int(np.searchsorted(self.borders, begin + at, side="right")) - 1
                raise ValueError(
                    f"{self.path}: document {document}: got {lengths[at]} tokens from byte {found[at]} of "
                    f"the .bin, expected them at {expected[at]}, where those before them end"
                )
            before = int(ends[-1])

    def _read(self, which: int, overlap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Parts of pointers (1) or borders (2), as of `in_parts`, each with `overlap` entries of the next:
        read, as mapped pages would pile up in memory.
        """
        begin, end = self._ends[which : which + 2]
        for at in range(begin, end - 8 * overlap, 8 * _PART):
            count = min(_PART + overlap, (end - at) // 8)
            yield (at - begin) // 8, np.fromfile(self.path, dtype=np.int64, count=count, offset=at)

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """Tokens int64 before each of `documents` in the .bin; ValueError as from `lengths`."""
        assert self.lengths.size, "who looks through the index has found it whole"
        sequences, last = self.borders[documents], self.pointers.size - 1
        # a document without sequences may stand behind the last
        begins = np.where(sequences > last, self.bytes, self.pointers[np.minimum(sequences, last)])
        return begins // self.dtype.itemsize


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """The .idx file of documents of one sequence each, in parts: of 100 million it is 2 GB."""
    with path.open("wb") as file:
        code = DType.code_from_dtype(dtype.type)
        file.write(_HEADER.pack(_MAGIC, 1, code, lengths.size, lengths.size + 1))
        file.write(lengths.tobytes())
        before = 0
        for at in range(0, lengths.size, _PART):
            part = lengths[at : at + _PART].astype(np.int64) * dtype.itemsize
            file.write((before + np.cumsum(part) - part).tobytes())
            before += int(part.sum())
        for at in range(0, lengths.size + 1, _PART):
            file.write(np.arange(at, min(at + _PART, lengths.size + 1), dtype=np.int64).tobytes())


def _read_header(path: str) -> tuple[np.dtype, int, int]:
    """Tokens' dtype, numbers of sequences and of borders, held against the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{path}: got {head[:9]!r}, expected an index of Megatron's format (MMIDIDX)")
    _, version, code, sequences, borders = _HEADER.unpack(head)
    expected = _HEADER.size + sequences * (4 + 8) + borders * 8
    if version != 1 or code not in _INTEGERS or size != expected or borders < 1:
        raise ValueError(
            f"{path}: got {size} bytes, version {version}, dtype code {code}; expected {expected} bytes for "
            f"the {sequences} sequences its header counts, version 1, integers"
        )
    return np.dtype(DType.dtype_from_code(code)), sequences, borders
