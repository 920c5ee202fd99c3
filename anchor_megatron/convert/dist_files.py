"""Megatron-Core's `torch_dist` checkpoints, written and read a piece at a time without a process group or a
model.

The format is torch.distributed.checkpoint's: `__0_0.distcp`, ... are torch.save'd pieces of tensors one after
another; `.metadata` says for each key its whole shape and which box of it lies where. A key of two layers cut
into three pieces:

    decoder.layers.mlp.linear_fc2.weight, size (2, 8, 4)
        at (0, 0, 0)  size (1, 8, 4)   file __0_0.distcp from byte 0
        at (1, 0, 0)  size (1, 5, 4)   ...
        at (1, 5, 0)  size (1, 3, 4)

Any cutting can be loaded at any parallel layout: a reader takes the parts of the pieces that its own box
meets. Values are neither loaded nor saved here: pieces are laid out around them and the caller copies rows
from file to file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
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

from anchor_megatron.convert.rows import FileRows, Place, Rows, TensorRows
from anchor_megatron.training.safe_load import read_metadata

__all__ = ["Box", "DistReader", "DistWriter"]

FILE_BYTES = 10 * 2**30  # a new file is begun beyond this


class DistWriter:
    """Lays one checkpoint out in an empty folder; it is none before `finish`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._stream: BinaryIO | None = None

    def lay_out(
        self,
        key: str,
        offsets: tuple[int, ...],
        size: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Place:
        """Makes room for the piece of `shape` at `offsets` of tensor `key`, whose whole shape is `size`.

        Returns where its bytes go, for the caller to write: a torch.save'd tensor keeps them in one run.
        """
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
        )
        assert isinstance(entry, TensorStorageMetadata) and entry.size == torch.Size(size), (
            f"{key}: two shapes"
        )
        assert entry.properties.dtype == dtype, f"{key}: two types"
        index = MetadataIndex(key, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)))
        stream, begin = self._position()
        piece, hole = torch.empty(shape, dtype=dtype), _Hole(stream)
        with torch.serialization.skip_data():  # everything but the values, a hole in their place
            torch.save(piece, cast("IO[bytes]", hole))
        assert hole.size == piece.nbytes, f"{key}: a hole of {hole.size} bytes for {piece.nbytes}"
        self._record(index, begin)
        return Place(stream.fileno(), hole.begin)

    def write_state(self, name: str) -> None:
        """Writes an empty module state under `name`."""
        self._tensors[name] = BytesStorageMetadata()
        stream, begin = self._position()
        torch.save([None], stream)
        self._record(MetadataIndex(name), begin)

    def finish(self) -> None:
        """Writes the metadata; Megatron-Core knows a checkpoint by the last file to appear."""
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


class _Hole:
    """A file as torch.save writes one, noting where it leaves out the values: it seeks over them."""

    def __init__(self, stream: BinaryIO) -> None:
        self.write, self.flush, self.tell = stream.write, stream.flush, stream.tell
        self._stream = stream
        self.begin = self.size = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves on by `offset`, the bytes of the values."""
        assert whence == os.SEEK_CUR and not self.size, "torch.save leaves one hole, going forward"
        self.begin, self.size = self._stream.tell(), offset
        return self._stream.seek(offset, whence)


class Box(NamedTuple):
    """A stored piece: where it begins in its tensor, how large it is, where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Any

    def rows(self, depth: int) -> tuple[int, int]:
        """First row and the row after the last, axis `depth` being the rows."""
        return self.offsets[depth], self.offsets[depth] + self.sizes[depth]


def _view(file: BinaryIO, begin: int, length: int) -> IO[bytes]:
    """Bytes [begin, begin + length) of `file` as a file."""
    return cast("IO[bytes]", _create_file_view(cast(io.IOBase, file), begin, length))


def _values_place(file: BinaryIO, begin: int, length: int) -> Place:
    """Where the values of the torch.save'd tensor at [begin, begin + length) of `file` begin.

    torch.save writes a zip archive without compression; the values are its record data/0.
    """
    archive: Any = torch._C.PyTorchFileReader(_view(file, begin, length))
    return Place(file.fileno(), begin + archive.get_record_offset("data/0"))


class DistReader:
    """Reads a checkpoint that training or `DistWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        """ValueError where `folder` is no complete checkpoint."""
        self.folder = folder
        path = folder / ".metadata"
        if not path.is_file() or not (folder / CONFIG_FNAME).is_file():
            raise ValueError(
                f"{folder}: expected a Megatron-Core checkpoint (.metadata, {CONFIG_FNAME}), got none"
            )
        metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._boxes: dict[tuple[str, tuple[int, ...]], list[Box]] = {}  # filled key by key
        self._sorted: set[str] = set()
        self._files: dict[str, BinaryIO] = {}
        self._storage = metadata.storage_data
        self._check_files()

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor. ValueError where there is none of that name."""
        if key not in self.tensors:
            raise ValueError(f"{self.folder}: {key}: got no such tensor, expected one")
        return self.tensors[key].properties.dtype

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

    def bands(self, key: str, index: tuple[int, ...]) -> Iterator[tuple[int, Rows]]:
        """The slice at `index` in runs of rows: (first row, rows), each as long as the pieces are.

        Pieces that tensor parallelism cut by columns are put together in memory, a band and one piece at a
        time.
        """
        depth, size = len(index), tuple(self.tensors[key].size[len(index) :])
        boxes = self.boxes(key, index)
        edges = sorted({row for box in boxes for row in box.rows(depth)})
        for start, stop in zip(edges, edges[1:], strict=False):
            meets = [box for box in boxes if box.rows(depth)[0] < stop and box.rows(depth)[1] > start]
            if (
                len(meets) == 1
                and meets[0].sizes[depth + 1 :] == size[1:]
                and meets[0].rows(depth) == (start, stop)
            ):
                yield start, self._rows(meets[0], depth)
                continue
            band = torch.empty(stop - start, *size[1:], dtype=self.dtype(key))
            filled = 0
            for box in meets:
                part = self._rows(box, depth).read(start - box.rows(depth)[0], stop - start)
                column = box.offsets[depth + 1] if len(size) > 1 else 0
                band.narrow(-1, column, part.shape[-1]).copy_(part)
                filled += part.numel()
            if filled != band.numel():
                raise ValueError(f"{self.folder}: {key}: got {filled} values of rows [{start}, {stop}), "
                                 f"expected {band.numel()}")  # fmt: skip
            yield start, TensorRows(band)

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            self._files.popitem()[1].close()

    def _rows(self, box: Box, depth: int) -> Rows:
        """The piece by its rows: on disk where its values lie in order. ValueError: its file is damaged."""
        name = box.place.relative_path
        if name not in self._files:
            self._files[name] = open(self.folder / name, "rb")
        try:
            view = _view(self._files[name], box.place.offset, box.place.length)
            with torch.serialization.skip_data():  # its shape and order, not its values
                tensor = torch.load(view, map_location="cpu", weights_only=True)
            shape = tuple(tensor.shape)
            if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
                place = _values_place(self._files[name], box.place.offset, box.place.length)
                rows: Rows = FileRows(place, shape[depth:], tensor.dtype)
            else:
                view.seek(0)
                rows = TensorRows(torch.load(view, map_location="cpu", weights_only=True).view(shape[depth:]))
        except Exception as error:  # pickle, zip and torch each raise their own
            raise ValueError(f"{self.folder / name}: damaged at byte {box.place.offset}: {error}") from error
        if shape != box.sizes:
            raise ValueError(f"{self.folder / name}: got a piece of {shape}, expected {box.sizes}")
        return rows

    def _check_files(self) -> None:
        """Every file is there and as long as the metadata says."""
        ends: dict[str, int] = {}
        for place in self._storage.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                raise ValueError(
                    f"{path}: got {'no such file' if size is None else f'{size} bytes'}, expected {end} bytes"
                )
