"""Text to Megatron's indexed format: read, tokenise in worker processes, write in input order.

    files -> records (raw bytes, with file and line) -> batches -> workers: decode, parse, encode -> data set

Records travel as bytes: decoding and parsing happen in the workers, and an error carries the file and the
line it is in. Output is written beside its final name and renamed at the end, so a failed run leaves no data
set behind, and it is the same whatever the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from anchor_megatron.data.documents import Summary
from anchor_megatron.data.records import Record, encode, start_worker
from anchor_megatron.data.tokenizer import anchor_token_id, load_tokenizer, train_tokenizer

__all__ = ["Job", "preprocess"]

_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Job:
    """One preprocessing run. `inputs` are JSONL files, text files or folders of either."""

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    json_key: str = "text"
    suffixes: tuple[str, ...] = ()
    """Of the files taken from folders; all files where empty."""
    anchor_token: str | None = None
    append_eod: bool = False
    workers: int = 1
    overwrite: bool = False


def preprocess(job: Job) -> tuple[Summary, float]:
    """Runs `job`; returns what was written and the seconds that tokenising took.

    Raises ValueError naming file and line, or the option, for input that cannot be used; nothing is written
    then.
    """
    if (job.tokenizer is None) == (job.train_tokenizer is None):
        raise ValueError("tokenizer: expected exactly one of --tokenizer DIR and --train-tokenizer N")
    files = _input_files(job)
    finals = {suffix: Path(f"{job.output}{suffix}") for suffix in (".bin", ".idx", ".json", "_tokenizer")}
    for path in finals.values():
        if path.exists() and not job.overwrite:
            raise ValueError(f"--output: {path} exists; give --overwrite to replace it")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{job.output.name}.", dir=job.output.parent) as aside:
        written = {suffix: Path(aside) / f"data{suffix}" for suffix in finals}
        _provide_tokenizer(job, files, written["_tokenizer"])
        summary, seconds = _tokenise(job, files, written, finals["_tokenizer"].name)
        for suffix in ("_tokenizer", ".bin", ".idx", ".json"):  # without its summary a prefix is no data set
            if finals[suffix].is_dir():
                shutil.rmtree(finals[suffix])
            os.replace(written[suffix], finals[suffix])
    return summary, seconds


def _input_files(job: Job) -> list[Path]:
    files: list[Path] = []
    for path in job.inputs:
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.is_file())
            found = [one for one in found if not job.suffixes or one.suffix in job.suffixes]
            if not found:
                raise ValueError(
                    f"{path}: holds no files{' ending in ' + ', '.join(job.suffixes) if job.suffixes else ''}"
                )
            files += found
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        elif not path.stat().st_size:
            raise ValueError(f"{path}: is empty")
        else:
            files.append(path)
    return files


def _records(files: list[Path]) -> Iterator[Record]:
    for path in files:
        if path.suffix != ".jsonl":
            yield Record(str(path), 0, path.read_bytes())
            continue
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Record(str(path), number, line)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _provide_tokenizer(job: Job, files: list[Path], folder: Path) -> None:
    """The tokenizer's folder, copied or trained."""
    if job.train_tokenizer is not None:
        texts = (record.text(job.json_key) for record in _records(files))
        train_tokenizer(texts, vocab_size=job.train_tokenizer, folder=folder)
        return
    assert job.tokenizer is not None, "a job names its tokenizer or has one trained"
    load_tokenizer(job.tokenizer)
    shutil.copytree(job.tokenizer, folder)


def _tokenise(
    job: Job, files: list[Path], written: dict[str, Path], tokenizer_name: str
) -> tuple[Summary, float]:
    tokenizer = load_tokenizer(written["_tokenizer"])
    anchor = anchor_token_id(tokenizer, job.anchor_token)
    end = tokenizer.eos_token_id if job.append_eod else None
    if job.append_eod and end is None:
        raise ValueError(f"--append-eod: the tokenizer {job.tokenizer} has no EOS token")
    dtype = DType.optimal_dtype(len(tokenizer))
    builder = IndexedDatasetBuilder(str(written[".bin"]), dtype=dtype)
    total_bytes = sum(path.stat().st_size for path in files)
    documents = tokens = longest = empty = largest = 0
    started = time.perf_counter()
    with (
        _encoded(job, _batches(_records(files)), written["_tokenizer"], np.dtype(dtype), end) as batches,
        tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenising") as progress,
    ):
        for ids, lengths, read in batches:
            for piece in np.split(ids, np.cumsum(lengths)[:-1]):
                if not piece.size:
                    empty += 1
                    continue
                builder.add_item(torch.from_numpy(piece.astype(np.int64)))
                builder.end_document()
            documents, tokens = documents + int((lengths > 0).sum()), tokens + ids.size
            longest = max(longest, int(lengths.max(initial=0)))
            largest = max(largest, int(ids.max(initial=0)))
            progress.update(read)
    if not tokens:
        raise ValueError(f"{', '.join(map(str, job.inputs))}: holds no text, expected at least one document")
    builder.finalize(str(written[".idx"]))
    summary = Summary(documents, tokens, longest, empty, largest, len(tokenizer), anchor, tokenizer_name)
    summary.write(written[".json"])
    return summary, time.perf_counter() - started


class _encoded:
    """Batches through the workers, in order: (ids [tokens], lengths [documents], bytes read)."""

    def __init__(
        self, job: Job, batches: Iterator[list[Record]], folder: Path, dtype: np.dtype, end: int | None
    ):
        self.job, self.batches = job, batches
        self.arguments = (str(folder), job.json_key, dtype, end)
        self.pool: Any = None

    def __enter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        if self.job.workers == 1:
            start_worker(*self.arguments)
            return map(encode, self.batches)
        context = multiprocessing.get_context("spawn")
        self.pool = context.Pool(self.job.workers, start_worker, self.arguments)
        return _bounded_map(self.pool, self.batches, ahead=4 * self.job.workers)

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.pool.terminate()


def _bounded_map(pool: Any, batches: Iterator[list[Record]], *, ahead: int) -> Iterator[Any]:
    """Like pool.imap, but reads no more than `ahead` batches before they are taken: memory stays bounded."""
    waiting: list[Any] = []
    for batch in batches:
        waiting.append(pool.apply_async(encode, (batch,)))
        if len(waiting) >= ahead:
            yield waiting.pop(0).get()
    for result in waiting:
        yield result.get()
