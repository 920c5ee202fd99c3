"""Pickles inside a checkpoint, looked at before torch or Megatron-Core load them with nothing held back.

`.metadata` is a pickle, and so are common.pt and the few entries that are no tensors (`_extra_state`). A
pickle can name any function to call, so each is first read by an unpickler that knows nothing but what
checkpoints consist of.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.utils import _create_file_view

__all__ = ["check_pickles", "read_metadata"]

_LARGEST_METADATA = 1 << 30  # bytes; 100,000 pieces take about 20 MB
_LARGEST_ENTRY = 64 << 20
_KNOWN: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", 
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's `.metadata`; ValueError where it is anything else."""
    path = folder / ".metadata"
    size = path.stat().st_size if path.is_file() else 0
    if not 0 < size <= _LARGEST_METADATA:
        raise ValueError(f"{path}: got {size} bytes, expected a checkpoint's metadata")
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{path}: refused to load it: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path}: got {type(found).__name__}, expected a checkpoint's metadata")
    return found


def check_pickles(folder: Path) -> None:
    """ValueError naming the file in `folder` whose pickle holds more than data, or whose place is no
    file's.
    """
    metadata = read_metadata(folder)
    _check_common(folder / "common.pt")
    try:
        entries = [
            (index.fqn, place.relative_path, int(place.offset), int(place.length))
            for index, place in metadata.storage_data.items()
        ]
        plain = {
            key
            for key, kind in metadata.state_dict_metadata.items()
            if isinstance(kind, BytesStorageMetadata)
        }
    except (AttributeError, TypeError, ValueError) as error:  # the right classes, with other things in them
        raise ValueError(f"{folder / '.metadata'}: expected a checkpoint's metadata, got {error}") from error
    for key, name, offset, length in entries:
        if not isinstance(name, str) or os.path.basename(name) != name or min(offset, length) < 0:
            raise ValueError(f"{folder / '.metadata'}: {key}: got file {name!r}, expected one beside it")
        if key in plain:
            _check_entry(folder / name, key, offset, length)


def _check_common(path: Path) -> None:
    """What Megatron-Core loads whole, with weights_only as torch's default has it."""
    size = path.stat().st_size if path.is_file() else 0
    if not 0 < size <= _LARGEST_ENTRY:
        raise ValueError(f"{path}: got {size} bytes, expected a checkpoint's plain values")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ValueError(f"{path}: refused to load it: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}, expected a dictionary")


def _check_entry(path: Path, key: str, offset: int, length: int) -> None:
    if length > _LARGEST_ENTRY:
        raise ValueError(f"{path}: {key}: got {length} bytes, expected at most {_LARGEST_ENTRY}")
    try:
        with open(path, "rb") as file:
            torch.load(_create_file_view(file, offset, length), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ValueError(f"{path}: {key}: refused to load it: {error}") from error
