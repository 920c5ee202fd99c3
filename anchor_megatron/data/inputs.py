"""From the paths a user names to batches of raw documents.

    a.jsonl  src/  ->  a.jsonl src/x.py src/y.py  ->  Record("a.jsonl", 1, b'{"text": ...'), ...  ->  batches

A line of a .jsonl file is one document, any other file is one. Files are read one at a time and lines one by
one, so memory does not grow with the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from anchor_megatron.data.records import Record

__all__ = ["batches", "input_files", "records"]

_BATCH_BYTES = 1 << 20  # of documents that go to a worker at once


def input_files(inputs: Iterable[Path], suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files behind `inputs`, those of a folder (at any depth) sorted and, where given, with one of
    `suffixes`; ValueError naming what is missing or empty.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.is_file())
            found = [one for one in found if not suffixes or one.suffix in suffixes]
            if not found:
                raise ValueError(
                    f"{path}: holds no files{' ending in ' * bool(suffixes)}{', '.join(suffixes)}"
                )
            files += found
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        elif not path.stat().st_size:
            raise ValueError(f"{path}: is empty, expected text")
        else:
            files.append(path)
    return files


def records(files: Iterable[Path]) -> Iterator[Record]:
    """The documents of `files` as they lie there; blank lines of JSONL are none."""
    for path in files:
        if path.suffix != ".jsonl":
            yield Record(str(path), 0, path.read_bytes())
            continue
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield Record(str(path), number, line)


def batches(found: Iterable[Record]) -> Iterator[list[Record]]:
    """`found` in lists of about a mebibyte."""
    batch: list[Record] = []
    size = 0
    for record in found:
        batch.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
