"""The .idx file of Megatron's indexed format, mapped: opening one of 100 million documents reads a few bytes.

    header                         magic, version, dtype of the tokens, numbers of sequences and of borders
    int32 [sequences]              lengths in tokens
    int64 [sequences]              bytes before each in the .bin
    int64 [documents + 1]          borders: the sequences before each document

Documents "5 6 7", "8 9" and "4" of two-byte tokens, a sequence each: lengths 3 2 1, bytes 0 6 10, borders
0 1 2 3. A document of several sequences is their tokens one after another.

The header may claim anything, and is held against the file's size before the arrays are mapped. Then only
their ends are looked at. Whether all lengths and borders make sense is asked by `lengths`, whether a document
lies where the lengths have it by `starts`, for the documents that are read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

__all__ = ["Index", "in_parts"]

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
_INTEGERS = {one.value for one in DType if np.issubdtype(DType.dtype_from_code(one.value), np.integer)}
_PART = 1 << 20  # entries looked at together, so that a look at a whole array takes no memory


def in_parts(array: np.ndarray, overlap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(first entry, entries) of an array's parts of bounded size, each with `overlap` entries of the next."""
    for begin in range(0, array.size - overlap, _PART):
        yield begin, array[begin : begin + _PART + overlap]


class Index:
    """What an .idx file says; ValueError naming it for what is no index, or not a whole one.

    dtype             of the tokens
    documents         their number
    bytes             that the .bin must have
    sequence_lengths  int32 [n], in tokens
    pointers          int64 [n], bytes before each sequence in the .bin
    borders           int64 [documents + 1], sequences before each document
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.dtype, sequences, borders = _read_header(path)
        self.documents = borders - 1
        mapped = np.memmap(path, mode="r")
        ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * borders])
        parts = [np.asarray(mapped[begin:end]) for begin, end in zip(ends, ends[1:], strict=False)]
        self.sequence_lengths = parts[0].view(np.int32)
        self.pointers, self.borders = (part.view(np.int64) for part in parts[1:])
        if self.borders[0] != 0 or self.borders[-1] != sequences:
            raise ValueError(f"{path}: document borders do not rise from 0 to its {sequences} sequences")
        self.bytes = 0
        if sequences:
            self.bytes = int(self.pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if self.bytes % self.dtype.itemsize:
            raise ValueError(
                f"{path}: got {self.bytes} bytes of tokens, expected a multiple of {self.dtype.itemsize}"
            )

    def lengths(self) -> np.ndarray:
        """Lengths of the documents in tokens, integers [documents]: the file's own where every document is a
        sequence. ValueError where lengths or borders are none, or lengths do not add up to the file.
        """
        tokens, least = 0, 0
        for _, part in in_parts(self.sequence_lengths):
            tokens, least = tokens + int(part.sum(dtype=np.int64)), min(least, int(part.min()))
        if least < 0 or tokens * self.dtype.itemsize != self.bytes:
            raise ValueError(
                f"{self.path}: got lengths of {tokens} tokens in all and {least} at least; expected them to "
                f"fill {self.bytes} bytes of {self.dtype}, none below 0"
            )
        one_each = self.documents == self.sequence_lengths.size
        for _, part in in_parts(self.borders, overlap=1):
            steps = np.diff(part)
            if steps.min() < 0:
                raise ValueError(f"{self.path}: document borders do not rise")
            one_each = one_each and bool((steps == 1).all())
        if one_each:
            return self.sequence_lengths
        before = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        return np.diff(before[self.borders])

    def starts(self, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens int64 before each of `documents` in the .bin; ValueError naming one that does not lie there
        between its neighbours with its length of `lengths`.
        """
        begins, ends = (
            self._bytes_before(self.borders[documents]),
            self._bytes_before(self.borders[documents + 1]),
        )
        size = self.dtype.itemsize
        # in int64: a document's bytes may pass the int32 in which its tokens are counted
        expected = lengths.astype(np.int64) * size
        lost = (begins < 0) | (begins % size != 0) | (ends > self.bytes) | (ends - begins != expected)
        if lost.any():
            which = int(np.argmax(lost))
            raise ValueError(
                f"{self.path}: document {documents[which]}: got bytes {begins[which]} to {ends[which]}, "
                f"expected {lengths[which]} tokens of {size} bytes between 0 and {self.bytes}"
            )
        return begins // size

    def _bytes_before(self, sequences: np.ndarray) -> np.ndarray:
        """Of sequences, or of the end behind the last."""
        last = self.pointers.size - 1
        return np.where(sequences > last, self.bytes, self.pointers[np.minimum(sequences, last)])


def _read_header(path: str) -> tuple[np.dtype, int, int]:
    """Tokens' dtype, numbers of sequences and of borders, held against the file's size."""
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
    return np.dtype(DType.dtype_from_code(code)), sequences, borders
