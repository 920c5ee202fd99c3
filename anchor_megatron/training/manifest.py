"""What a checkpoint's folder must hold, byte for byte, and whether it still does.

    step_0000100/manifest.json    {"step": 100, "files": {"__0_0.distcp": {"bytes": 5120, "sha256":
    "9f86..."}, ...}}

The manifest is written last, before the folder takes its name, so a folder without one was never finished.
A file that is missing, longer, shorter or changed is found before anything is loaded, and named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "Entry", "check_files", "entry_of", "listed_files", "read_manifest", "write_manifest"]

MANIFEST = "manifest.json"
_BLOCK = 1 << 22
_LARGEST = 64 << 20  # bytes of a manifest: 100 bytes a file, half a million files

Entry = dict[str, Any]  # {"bytes": int, "sha256": str}


def entry_of(path: Path) -> Entry:
    """A file's size and SHA-256, read from the disk."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def listed_files(folder: Path) -> list[str]:
    """Names of all files below `folder` but the manifest, relative to it."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path, *, step: int, known: dict[str, Entry]) -> None:
    """Writes the manifest of all files in `folder`, through to the disk. known: entries already computed."""
    files = {name: known.get(name) or entry_of(folder / name) for name in listed_files(folder)}
    with open(folder / MANIFEST, "w") as file:
        json.dump({"step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Files of `folder` by its manifest, each there and of its size.

    ValueError naming the file that is not. Extra files are no fault: nothing reads them.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, expected the manifest of a finished checkpoint")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected at most {_LARGEST}")
    try:
        files = json.loads(path.read_bytes())["files"]
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a manifest, got {error!r}") from error
    for name, (size, _) in entries.items():
        file = folder / name
        if folder.resolve() not in file.resolve().parents:
            raise ValueError(f"{path}: {name}: got a path out of the folder, expected one inside")
        got = file.stat().st_size if file.is_file() else None
        if got != size:
            raise ValueError(
                f"{file}: got {'no such file' if got is None else f'{got} bytes'}, expected {size} bytes"
            )
    for needed in (".metadata", "metadata.json", "common.pt", "config.yaml"):
        if needed not in entries:
            raise ValueError(f"{path}: got no entry for {needed}, expected one")
    return files


def check_files(folder: Path, entries: dict[str, Entry], names: Iterable[str]) -> str | None:
    """The first of `names` whose bytes are not those of its entry, as a message; None where all are."""
    for name in names:
        try:
            found = entry_of(folder / name)["sha256"]
        except OSError as error:
            return f"{folder / name}: cannot be read: {error.strerror}"
        if found != entries[name]["sha256"]:
            expected = entries[name]["sha256"]
            return f"{folder / name}: got SHA-256 {found}, expected {expected}: its bytes have changed"
    return None
