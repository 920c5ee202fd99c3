"""The output of a run that is not over, in a folder beside it, from which a later run goes on.

    .PREFIX.unfinished/   tokens     token ids, appended to    journal   settings, then a line when files
                          lengths    int32, a document each              are done: which, how much written,
                          sources    int32, a document each              checksums, counts
                          tokenizer/                           lock      held by the run at work

A kill costs the files since the last line. The next run with the same settings and the same files at the same
times reads that line, holds what was written against its checksums, cuts off what came behind, and goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from anchor_megatron.data.index import write_index
from anchor_megatron.data.inputs import InputFile

__all__ = ["Unfinished", "stamp"]

_STREAMS = ("tokens", "lengths", "sources")
_PART = 1 << 20  # of what is copied or checked at once
_LONGEST = np.iinfo(np.int32).max  # tokens of a document in the indexed format


class Unfinished:
    """What is written so far. `files_done` of the run's files need not be read again; `counts` is what the
    caller had at the last `commit`, to be changed in place.
    """

    def __init__(self, folder: Path) -> None:
        """Opens or makes `folder`; ValueError where another run is at work there."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another run is at work there, expected one at a time") from error
        self.files_done = 0
        self.counts: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}  # of sources, of which the journal has the first `_noted`
        self._noted = 0
        self._sums = dict.fromkeys(_STREAMS, 0)
        self._sizes = dict.fromkeys(_STREAMS, 0)
        self._files: dict[str, IO[bytes]] = {}

    def resume(self, settings: dict[str, Any], files: Sequence[InputFile]) -> str | None:
        """Takes up what an earlier run with these settings left; why not, where there is something else."""
        try:
            first, *lines = (self.folder / "journal").read_bytes().split(b"\n")[:-1]  # a torn line has no end
            told, notes = json.loads(first), [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        if told != settings:
            names = [name for name in settings if told.get(name) != settings[name]]
            return f"other {', '.join(names)}"
        if not notes:
            return None
        done, last = [file for note in notes for file in note["files"]], notes[-1]
        if done != [stamp(file) for file in files[: len(done)]]:
            return "other input files"
        for name in _STREAMS:
            if _checksum(self.folder / name, last["sizes"][name]) != last["sums"][name]:
                return f"{name} that differ from their checksum"
        self.files_done, self.counts = len(done), last["counts"]
        names = list(dict.fromkeys(name for note in notes for name in note["source_names"]))
        self._numbers, self._noted = {name: number for number, name in enumerate(names)}, len(names)
        self._sums, self._sizes = last["sums"], last["sizes"]
        return None

    def start(self, settings: dict[str, Any]) -> None:
        """Makes journal and streams ready to be appended to."""
        journal = self.folder / "journal"
        if self.files_done:
            os.truncate(journal, journal.read_bytes().rindex(b"\n") + 1)
        else:
            journal.write_text(json.dumps(settings) + "\n")
        for name in _STREAMS:
            self._files[name] = (self.folder / name).open("ab")
            self._files[name].truncate(self._sizes[name])

    def append(self, ids: np.ndarray, lengths: np.ndarray, sources: Sequence[str | None]) -> None:
        """Documents, one after another; `sources` None for those that have none."""
        if lengths.max(initial=0) > _LONGEST:
            raise ValueError(f"got a document of {lengths.max()} tokens, expected at most {_LONGEST}")
        known = self._numbers
        numbers = [-1 if name is None else known.setdefault(name, len(known)) for name in sources]
        streams = (ids, lengths.astype(np.int32), np.array(numbers, dtype=np.int32))
        for name, array in zip(_STREAMS, streams, strict=True):
            raw = array.tobytes()
            self._files[name].write(raw)
            self._sizes[name] += len(raw)
            self._sums[name] = zlib.crc32(raw, self._sums[name])

    def commit(self, files: Sequence[InputFile]) -> None:
        """Notes that `files`, the first of the run's, are done."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        line = dict(
            files=[stamp(file) for file in files[self.files_done :]], sizes=self._sizes, sums=self._sums,
            counts=self.counts, source_names=self.source_names[self._noted :],
        )  # fmt: skip
        with (self.folder / "journal").open("a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.files_done, self._noted = len(files), len(self._numbers)

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, by their numbers."""
        return list(self._numbers)

    @property
    def crc32(self) -> int:
        """Of all token ids so far."""
        return self._sums["tokens"]

    def finish(self, dtype: np.dtype) -> dict[str, Path]:
        """Closes the streams; the parts of the data set, by suffix. Without sources where no document has
        one; ValueError where some have.
        """
        for file in self._files.values():
            file.close()
        parts = {".bin": self.folder / "tokens", ".idx": self.folder / "index"}
        lengths = np.memmap(self.folder / "lengths", dtype=np.int32, mode="r")
        write_index(parts[".idx"], lengths, dtype)
        sources = np.memmap(self.folder / "sources", dtype=np.int32, mode="r")
        without = int((sources < 0).sum())
        if self.source_names and without:
            raise ValueError(
                f"{without} of {sources.size} documents have no source, expected all of them or none "
                "(--source-from gives one to those that name none)"
            )
        if self.source_names:
            parts["_sources.npy"] = self.folder / "sources.npy"
            np.save(parts["_sources.npy"], sources.astype(np.min_scalar_type(len(self.source_names))))
        return parts

    def close(self, *, keep: bool) -> None:
        """Ends the run's hold on the folder; removes it where it is not to be kept."""
        for file in self._files.values():
            file.close()
        if not keep:
            shutil.rmtree(self.folder)
        self._lock.close()


def stamp(file: InputFile) -> list[Any]:
    """A file's name, size and time, and those of the tokens beside an index."""
    found = [file.path] + [file.path.with_suffix(".bin")] * (file.kind == "indexed")
    stats = [path.stat() for path in found]
    return [str(file.path), [one.st_size for one in stats], [one.st_mtime_ns for one in stats]]


def _checksum(path: Path, size: int) -> int | None:
    """Of the file's first `size` bytes; None where it has fewer."""
    found = 0
    with path.open("rb") as file:
        while size and (part := file.read(min(size, _PART))):
            found = zlib.crc32(part, found)
            size -= len(part)
    return None if size else found
