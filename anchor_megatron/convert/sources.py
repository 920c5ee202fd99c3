"""Hugging Face weights on disk, by name.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes. Rows of a tensor are one run of bytes, so they can be copied without reading the rest: no
mapping of whole files, whose address space a memory limit would count.

    source = open_source(folder)
    source.tensors["model.norm.weight"]      -> FileRows(Place(fd, 5120), shape=(64,), dtype=torch.bfloat16)

Everything about the files (a shard that is missing or cut short, a header that contradicts itself, a hash) is
checked when the folder is opened, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchor_megatron.convert.rows import FileRows, Place, Rows, TensorRows

__all__ = ["DTYPES", "Source", "open_source"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_HASH_BLOCK = 1 << 24


class Source:
    """A model's tensors, and the files they lie in, open until `close`."""

    def __init__(self) -> None:
        self.tensors: dict[str, Rows] = {}
        self.descriptors: list[int] = []

    def add(self, path: Path, name: str, rows: Rows) -> None:
        """Takes a tensor in; ValueError for a name that is there already."""
        if name in self.tensors:
            raise ValueError(f"{path}: {name}: got it in two files, expected it in one")
        self.tensors[name] = rows

    def close(self) -> None:
        """Closes the files."""
        self.tensors.clear()
        while self.descriptors:
            os.close(self.descriptors.pop())


def open_source(folder: Path, *, allow_pickle: bool = False, check_hashes: bool = False) -> Source:
    """The weights in `folder`: safetensors, or with `allow_pickle` .bin files where there are no safetensors.

    check_hashes: compare every file with the SHA-256 known for it (see `known_hashes`). Raises ValueError
    naming the file for whatever is missing, cut short or contradictory.
    """
    for suffix, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        files = _weight_files(folder, name)
        if not files:
            continue
        if suffix == "bin" and not allow_pickle:
            raise ValueError(
                f"{folder}: got only {name} (a pickle), expected safetensors; --allow-pickle reads it, "
                "with weights_only"
            )
        if check_hashes:
            _check_hashes(folder, files)
        return _open(files, _add_safetensors if suffix == "safetensors" else _add_pickle)
    raise ValueError(f"{folder}: expected model.safetensors or model.safetensors.index.json, got neither")


def _open(files: dict[Path, list[str] | None], add: Callable[[Source, Path], None]) -> Source:
    """files: paths, each with the names it must hold (None: whatever it holds)."""
    source = Source()
    try:
        for path, names in files.items():
            add(source, path)
            missing = [name for name in names or () if name not in source.tensors]
            if missing:
                raise ValueError(f"{path}: expected {missing[0]}, as the index says, got a file without it")
    except BaseException:
        source.close()
        raise
    return source


def _add_safetensors(source: Source, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    source.descriptors.append(descriptor)
    header, first = _read_header(path, descriptor)
    for name, entry in header.items():
        place = Place(descriptor, first + entry["data_offsets"][0])
        source.add(path, name, FileRows(place, tuple(entry["shape"]), DTYPES[entry["dtype"]]))


def _add_pickle(source: Source, path: Path) -> None:
    """A torch.save'd dictionary, loaded with weights_only and mapped rather than read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ValueError(f"{path}: torch cannot load it with weights_only: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: got {type(state).__name__}, expected a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values() or not tensor.dim():
            raise ValueError(f"{path}: {name}: got {type(tensor).__name__}, expected a floating-point tensor")
        source.add(path, name, TensorRows(tensor))


def _weight_files(folder: Path, name: str) -> dict[Path, list[str] | None]:
    """Files of the checkpoint `name` (one, or those of its index) with the tensors expected in each."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return {folder / name: None} if (folder / name).is_file() else {}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names: dict[Path, list[str]] = {}
        for tensor, file in weight_map.items():
            names.setdefault(folder / Path(file).name, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected an index with a weight_map, got {error!r}") from error
    for path in names:
        if not path.is_file():
            raise ValueError(f"{path}: expected a shard of {index.name}, got no such file")
    return {**names}


def _read_header(path: Path, descriptor: int) -> tuple[dict[str, Any], int]:
    """The header's tensors and the offset of the first tensor's bytes, checked against the file's size."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(
            f"{path}: got {size} bytes and a header of {length}, expected a whole safetensors file"
        )
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        ends = [_check_entry(name, entry) for name, entry in header.items()]
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected a safetensors header, got {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path}: got {size} bytes, expected {expected} by its header: it is truncated or damaged"
        )
    return header, 8 + length


def _check_entry(name: str, entry: dict[str, Any]) -> int:
    """The offset of the tensor's end; ValueError where type, shape and offsets do not fit together."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} of type {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    count = DTYPES[entry["dtype"]].itemsize
    for axis in entry["shape"]:
        count *= axis
    begin, end = entry["data_offsets"]
    if not entry["shape"] or begin < 0 or end - begin != count:
        raise ValueError(
            f"{name} of shape {entry['shape']} at bytes [{begin}, {end}), expected {count} bytes"
        )
    return int(end)


def known_hashes(folder: Path, path: Path) -> str | None:
    """The SHA-256 recorded for a file: in SHA256SUMS, or by Hugging Face's downloader; else None."""
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        for line in sums.read_text().splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().lstrip("*") == path.name:
                return digest.lower()
    candidates: Iterator[str] = iter(())
    downloaded = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if downloaded.is_file():
        candidates = iter(downloaded.read_text().split())  # commit, etag (the hash of a large file), time
    elif path.is_symlink():  # the hub's cache: a snapshot's files are links to blobs named by their hash
        candidates = iter([Path(os.readlink(path)).name])
    return next((word for word in candidates if re.fullmatch("[0-9a-f]{64}", word)), None)


def _check_hashes(folder: Path, files: dict[Path, list[str] | None]) -> None:
    for path in files:
        expected = known_hashes(folder, path)
        if expected is None:
            raise ValueError(
                f"{path}: --check-hashes: expected its SHA-256 in {folder / 'SHA256SUMS'}, got none"
            )
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise ValueError(f"{path}: got SHA-256 {digest.hexdigest()}, expected {expected}")
