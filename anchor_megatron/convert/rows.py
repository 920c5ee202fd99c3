"""Rows of tensors, in files or in memory, copied into files.

Converting moves rows without changing them. Between files they pass through one small buffer that stays in
the processor's cache (measured: faster than the kernel's own copy_file_range, which `cp` uses), so a
conversion is as fast as a copy of the files and takes no memory.

    rows = FileRows(Place(fd, 1000), shape=(8, 4), dtype=torch.bfloat16)    8 rows of 8 bytes from byte 1000
    rows.copy(2, 3, Place(other, 64))                                       bytes [1016, 1040) to other's 64
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["FileRows", "Place", "Rows", "TensorRows", "as_bytes", "row_bytes", "same_values", "total_bytes"]

_BLOCK = 1 << 19  # bytes
_buffer = memoryview(bytearray(_BLOCK))


class Place(NamedTuple):
    """A byte of an open file."""

    descriptor: int
    offset: int


class Rows(Protocol):
    """A tensor by its rows (axis 0)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def copy(self, start: int, count: int, to: Place) -> None:
        """Writes the bytes of rows [start, start + count) to a file. OSError where the disk refuses."""
        ...

    def read(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) as a tensor [count, ...]."""
        ...


@dataclass(frozen=True)
class FileRows:
    """A tensor whose bytes lie in a file, row after row."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype

    def copy(self, start: int, count: int, to: Place) -> None:
        """See `Rows`."""
        self._check(start, count)
        size = row_bytes(self)
        _copy_bytes(Place(self.place.descriptor, self.place.offset + start * size), to, count * size)

    def read(self, start: int, count: int) -> Tensor:
        """See `Rows`."""
        self._check(start, count)
        rows = torch.empty(count, *self.shape[1:], dtype=self.dtype)
        view, offset = as_bytes(rows), self.place.offset + start * row_bytes(self)
        while view:
            done = os.preadv(self.place.descriptor, [view], offset)
            _check_progress(done)
            view, offset = view[done:], offset + done
        return rows

    def _check(self, start: int, count: int) -> None:
        assert 0 <= start and start + count <= self.shape[0], (
            f"rows [{start}, {start + count}) of {self.shape}"
        )


@dataclass(frozen=True)
class TensorRows:
    """A tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.tensor.dtype

    def copy(self, start: int, count: int, to: Place) -> None:
        """See `Rows`."""
        view, offset = as_bytes(self.read(start, count).contiguous()), to.offset
        while view:
            done = os.pwrite(to.descriptor, view, offset)
            view, offset = view[done:], offset + done

    def read(self, start: int, count: int) -> Tensor:
        """See `Rows`."""
        assert 0 <= start and start + count <= len(self.tensor), (
            f"rows [{start}, {start + count}) of {self.shape}"
        )
        return self.tensor[start : start + count]


def row_bytes(rows: Rows) -> int:
    """Bytes of one row."""
    return math.prod(rows.shape[1:]) * rows.dtype.itemsize


def total_bytes(rows: Rows) -> int:
    """Bytes of the tensor."""
    return rows.shape[0] * row_bytes(rows)


def same_values(first: Rows, second: Rows) -> bool:
    """Whether both have the same shape, type and bytes; looks at one block at a time."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    step = max(1, _BLOCK // max(1, row_bytes(first)))
    for start in range(0, first.shape[0], step):
        count = min(step, first.shape[0] - start)
        if as_bytes(first.read(start, count).contiguous()) != as_bytes(
            second.read(start, count).contiguous()
        ):
            return False
    return True


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous(), "rows are read and written as one run of bytes"
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _copy_bytes(source: Place, to: Place, count: int) -> None:
    done = 0
    while done < count:
        step = os.preadv(source.descriptor, [_buffer[: count - done]], source.offset + done)
        _check_progress(step)
        written = 0
        while written < step:
            written += os.pwrite(to.descriptor, _buffer[written:step], to.offset + done + written)
        done += step


def _check_progress(step: int) -> None:
    if step == 0:
        raise ValueError("a file became shorter while it was read")
