"""Safetensors files written in place: the headers first, then rows in whatever order they come.

All shapes are known before the first byte, so every tensor's place is too; a file is laid out, and rows are
written where they belong. Nothing waits in memory for its neighbours. Files hold at most `SHARD_BYTES` (one
tensor may be larger), named as transformers names them:

    model.safetensors                                            where one file is enough
    model-00001-of-00002.safetensors, ..., model.safetensors.index.json
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchor_megatron.convert.rows import Place, Rows
from anchor_megatron.convert.sources import DTYPES

__all__ = ["SHARD_BYTES", "SafetensorsWriter", "TensorInfo"]

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsWriter:
    """The files of one model, open for writing until `finish`."""

    def __init__(
        self, folder: Path, tensors: dict[str, TensorInfo], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Lays the files out in `folder`. tensors: everything that will be written, in order."""
        self._tensors = tensors
        self._places: dict[str, Place] = {}
        self._rows_left = {name: info.shape[0] for name, info in tensors.items()}
        self._descriptors: list[int] = []
        shards = _shards(tensors, shard_bytes)
        weight_map: dict[str, str] = {}
        try:
            for number, names in enumerate(shards, start=1):
                file = "model.safetensors"
                if len(shards) > 1:
                    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._lay_out(folder / file, names)
                weight_map |= dict.fromkeys(names, file)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            total = sum(_bytes(info) for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, row: int, rows: Rows, start: int, count: int) -> None:
        """Writes rows [start, start + count) of `rows` as tensor `name`'s from `row` on."""
        info, place = self._tensors[name], self._places[name]
        assert rows.dtype == info.dtype and rows.shape[1:] == info.shape[1:], (
            f"{name}: rows of another tensor"
        )
        rows.copy(start, count, Place(place.descriptor, place.offset + row * (_bytes(info) // info.shape[0])))
        self._rows_left[name] -= count

    def finish(self) -> None:
        """Closes the files; every row must have been written."""
        unwritten = [name for name, left in self._rows_left.items() if left]
        assert not unwritten, f"{unwritten[0]}: {self._rows_left[unwritten[0]]} rows were never written"
        self.close()

    def close(self) -> None:
        """Closes the files as they are."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _lay_out(self, path: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            info = self._tensors[name]
            begin, end = end, end + _bytes(info)
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        os.write(descriptor, len(text).to_bytes(8, "little") + text)
        os.ftruncate(descriptor, 8 + len(text) + end)
        for name in names:
            begin = header[name]["data_offsets"][0]
            self._places[name] = Place(descriptor, 8 + len(text) + begin)


def _shards(tensors: dict[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Names by file, in order; in a file the widest types first, so that each tensor is aligned."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, info in tensors.items():
        if shards[-1] and _bytes(info) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= _bytes(info)
    return [sorted(names, key=lambda name: -tensors[name].dtype.itemsize) for names in shards]


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize
