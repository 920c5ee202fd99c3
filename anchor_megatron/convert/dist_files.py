"""Megatron-Core's `torch_dist` checkpoints, written and read a piece at a time without a process group or a model.

The format is torch.distributed.checkpoint's: `__0_0.distcp`, ... are torch.save'd pieces of tensors one after another;
`.metadata` says for each key its whole shape and which box of it lies where. A key of two layers cut into three pieces:

    decoder.layers.mlp.linear_fc2.weight  size (2, 8, 4)   at (0, 0, 0) size (1, 8, 4)   file __0_0.distcp, byte 0
                                                           at (1, 0, 0) size (1, 5, 4)   ...
                                                           at (1, 5, 0) size (1, 3, 4)

Any cutting can be loaded at any parallel layout: a reader takes the parts of the pieces that its own box meets. torch's
own FileSystemWriter is not used because it holds a file's tensors until the file is done.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

__all__ = ["Box", "DistReader", "DistWriter"]

FILE_BYTES = 10 * 2**30  # a new file is begun beyond this


class DistWriter:
    """Writes one checkpoint into an empty folder; it is none before `finish`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._stream: BinaryIO | None = None

    def write(self, key: str, offsets: tuple[int, ...], size: tuple[int, ...], piece: Tensor) -> None:
        """Writes `piece` (as many axes as `size`, the whole tensor's shape) at `offsets` of tensor `key`."""
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(size), [])
        )
        assert isinstance(entry, TensorStorageMetadata) and entry.size == torch.Size(size), f"{key}: two shapes"
        assert entry.properties.dtype == piece.dtype, f"{key}: two types"
        index = MetadataIndex(key, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        stream, begin = self._position()
        torch.save(piece, stream)
        self._record(index, begin)

    def write_state(self, name: str) -> None:
        """Writes an empty module state under `name`."""
        self._tensors[name] = BytesStorageMetadata()
        stream, begin = self._position()
        torch.save([None], stream)
        self._record(MetadataIndex(name), begin)

    def finish(self) -> None:
        """Writes the metadata; the last file to appear is the one by which Megatron-Core knows a checkpoint."""
        self.close()
        metadata = Metadata(
            self._tensors,
            storage_data=self._storage,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))
        torch.save({}, self._folder / COMMON_STATE_FNAME)
        config = CheckpointingConfig(sharded_backend="torch_dist")
        (self._folder / CONFIG_FNAME).write_text(json.dumps(dataclasses.asdict(config)))

    def close(self) -> None:
        """Closes the file being written."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _position(self) -> tuple[BinaryIO, int]:
        if self._stream is not None and self._stream.tell() >= FILE_BYTES:
            self.close()
        if self._stream is None:
            self._name = f"__0_{self._files}.distcp"
            self._stream = open(self._folder / self._name, "xb")
            self._files += 1
        return self._stream, self._stream.tell()

    def _record(self, index: MetadataIndex, begin: int) -> None:
        assert self._stream is not None, "a piece was just written"
        self._storage[index] = _StorageInfo(self._name, begin, self._stream.tell() - begin)


class Box(NamedTuple):
    """A stored piece: where it begins in its tensor, how large it is, where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Any


class DistReader:
    """Reads a checkpoint that training or `DistWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        """ValueError where `folder` is no complete checkpoint."""
        self.folder = folder
        path = folder / ".metadata"
        if not path.is_file() or not (folder / CONFIG_FNAME).is_file():
            raise ValueError(f"{folder}: expected a Megatron-Core checkpoint (.metadata, {CONFIG_FNAME}), got none")
        try:
            with open(path, "rb") as file:
                metadata = pickle.load(file)
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"{path}: expected torch.distributed.checkpoint's metadata, got {error!r}") from error
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._boxes: dict[tuple[str, tuple[int, ...]], list[Box]] = {}  # filled key by key
        self._sorted: set[str] = set()
        self._storage = metadata.storage_data
        self._check_files()

    def boxes(self, key: str, index: tuple[int, ...]) -> list[Box]:
        """The pieces of `key` whose leading offsets are `index`, each of size one along those axes."""
        if key not in self._sorted:
            self._sorted.add(key)
            for chunk in self.tensors[key].chunks:
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                assert sizes[: len(index)] == (1,) * len(index), f"{key}: a piece spans several layers"
                box = Box(offsets, sizes, self._storage[MetadataIndex(key, offsets)])
                self._boxes.setdefault((key, offsets[: len(index)]), []).append(box)
        return self._boxes.get((key, index), [])

    def read(self, box: Box) -> Tensor:
        """The piece's tensor. ValueError where its file is damaged."""
        with open(self.folder / box.place.relative_path, "rb") as file:
            view = _create_file_view(file, box.place.offset, box.place.length)
            try:
                found = torch.load(view, map_location="cpu", weights_only=True)
            except Exception as error:  # pickle, zip and torch each raise their own
                raise ValueError(f"{self.folder / box.place.relative_path}: damaged: {error}") from error
        if tuple(found.shape) != box.sizes:
            raise ValueError(f"{file.name}: got a piece of {tuple(found.shape)}, expected {box.sizes}")
        return found

    def bands(self, key: str, index: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
        """The slice at `index` in runs of rows: (first row, [rows, ...]), each as long as the pieces are.

        Pieces that tensor parallelism cut by columns are put together, so a band and one piece are in memory at once.
        """
        depth, size = len(index), self.tensors[key].size[len(index) :]
        boxes = self.boxes(key, index)
        edges = sorted({row for box in boxes for row in (box.offsets[depth], box.offsets[depth] + box.sizes[depth])})
        for start, stop in zip(edges, edges[1:], strict=False):
            meets = [box for box in boxes if box.offsets[depth] < stop and box.offsets[depth] + box.sizes[depth] > start]
            if len(meets) == 1 and meets[0].sizes[depth + 1 :] == size[1:]:
                yield start, self._rows(meets[0], depth, start, stop)
                continue
            band = torch.empty(stop - start, *size[1:], dtype=self.tensors[key].properties.dtype)
            filled = 0
            for box in meets:
                part = self._rows(box, depth, start, stop)
                column = box.offsets[depth + 1] if len(size) > 1 else 0
                band.narrow(-1, column, part.shape[-1]).copy_(part)
                filled += part.numel()
            if filled != band.numel():
                raise ValueError(f"{self.folder}: {key}: got {filled} values of rows [{start}, {stop}), "
                                 f"expected {band.numel()}")  # fmt: skip
            yield start, band

    def _rows(self, box: Box, depth: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the slice, those columns that the piece has."""
        return self.read(box).view(box.sizes[depth:])[start - box.offsets[depth] : stop - box.offsets[depth]]

    def _check_files(self) -> None:
        """Every file is there and as long as the metadata says."""
        ends: dict[str, int] = {}
        for place in self._storage.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                raise ValueError(f"{path}: got {'no such file' if size is None else f'{size} bytes'}, expected {end} bytes")
