"""Text to Megatron's indexed format: read, tokenise in worker processes, write in input order.

    inputs -> files -> records (raw bytes, with file and line) -> workers: decode, parse, encode -> data set
    a.jsonl, src/      3 lines, 2 modules                          5 token arrays      PREFIX.bin .idx .json

The data set is written aside and renamed at the end, so a failed run leaves none behind, and it is the same
whatever the number of workers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from anchor_megatron.data.documents import Summary
from anchor_megatron.data.inputs import batches, input_files, records
from anchor_megatron.data.pool import encoded
from anchor_megatron.data.records import Encoded, Encoder
from anchor_megatron.data.tokenizer import (
    anchor_token_id,
    encoder_source,
    load_tokenizer,
    train_tokenizer,
)

__all__ = ["Job", "preprocess"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*")


@dataclass(frozen=True)
class Job:
    """One preprocessing run. `inputs` are JSONL files, text files or folders of either."""

    inputs: tuple[Path, ...]
    output: Path
    """Prefix of the data set."""
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    json_key: str = "text"
    suffixes: tuple[str, ...] = ()
    """Of the files taken from folders; all files where empty."""
    anchor_token: str | None = None
    append_eod: bool = False
    workers: int = 1
    overwrite: bool = False

    @property
    def finals(self) -> dict[str, Path]:
        """What the run writes; the summary, without which a prefix is no data set, last."""
        return {suffix: Path(f"{self.output}{suffix}") for suffix in ("_tokenizer", ".bin", ".idx", ".json")}


def preprocess(job: Job) -> tuple[Summary, float]:
    """Runs `job`; returns what was written and the seconds that tokenising took.

    Raises ValueError naming file and line, or the option, for input that cannot be used; nothing is written
    then.
    """
    _check(job)
    files = input_files(job.inputs, job.suffixes)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{job.output.name}.", dir=job.output.parent) as aside:
        written = {suffix: Path(aside) / f"data{suffix}" for suffix in job.finals}
        tokenizer = _provide_tokenizer(job, files, written["_tokenizer"])
        summary, seconds = _tokenise(job, files, tokenizer, written)
        _move(written, job.finals)
    return summary, seconds


def _check(job: Job) -> None:
    if (job.tokenizer is None) == (job.train_tokenizer is None):
        raise ValueError("--tokenizer: expected exactly one of --tokenizer DIR and --train-tokenizer N")
    if job.workers < 1:
        raise ValueError(f"--workers: got {job.workers}, expected at least 1")
    for path in job.finals.values():
        if path.exists() and not job.overwrite:
            raise ValueError(f"--output: {path} exists; give --overwrite to replace it")


def _move(written: dict[str, Path], finals: dict[str, Path]) -> None:
    """Renames into place; an old summary goes first, so that no moment shows a mixture as a data set."""
    finals[".json"].unlink(missing_ok=True)
    if finals["_tokenizer"].exists():
        shutil.rmtree(finals["_tokenizer"])
    for suffix, path in finals.items():
        os.replace(written[suffix], path)


def _provide_tokenizer(job: Job, files: list[Path], folder: Path) -> Any:
    """The tokenizer, and its files in `folder`: copied, without a model's weights beside them, or trained."""
    if job.train_tokenizer is not None:
        texts = (record.text(job.json_key) for record in records(files))
        train_tokenizer(texts, vocab_size=job.train_tokenizer, folder=folder)
        return load_tokenizer(folder)
    assert job.tokenizer is not None, "a job names its tokenizer or has one trained"
    tokenizer = load_tokenizer(job.tokenizer)
    shutil.copytree(job.tokenizer, folder, ignore=shutil.ignore_patterns(*_WEIGHTS))
    return tokenizer


def _tokenise(job: Job, files: list[Path], tokenizer: Any, written: dict[str, Path]) -> tuple[Summary, float]:
    anchor = anchor_token_id(tokenizer, job.anchor_token)
    if job.append_eod and tokenizer.eos_token_id is None:
        raise ValueError(f"--append-eod: the tokenizer {job.tokenizer} has no EOS token")
    end = [int(tokenizer.eos_token_id)] if job.append_eod else []
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # more than len() where ids have gaps
    dtype = np.dtype(DType.optimal_dtype(vocab_size))
    source = encoder_source(tokenizer, written["_tokenizer"])
    make_encoder = partial(Encoder.open, source, job.json_key, dtype, end)
    total_bytes = sum(path.stat().st_size for path in files)
    started = time.perf_counter()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenising") as progress:
        found = encoded(make_encoder, batches(records(files)), workers=job.workers)
        counts = _write(job, _shown(found, progress), written, dtype)
    summary = Summary(
        **counts,
        vocab_size=vocab_size,
        anchor_token=anchor,
        tokenizer=job.finals["_tokenizer"].name,
        sources=[path.name for path in job.inputs],
    )
    summary.write(written[".json"])
    return summary, time.perf_counter() - started


def _shown(found: Iterator[Encoded], progress: tqdm) -> Iterator[Encoded]:
    tokens = 0
    for batch in found:
        yield batch
        tokens += batch.ids.size
        progress.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        progress.update(batch.bytes_read)


def _write(job: Job, found: Iterator[Encoded], written: dict[str, Path], dtype: np.dtype) -> dict[str, int]:
    """Writes .bin and .idx; the summary's counts. ValueError for an input file of no text."""
    builder = IndexedDatasetBuilder(str(written[".bin"]), dtype=dtype.type)
    counts = dict.fromkeys(("documents", "tokens", "longest", "empty", "largest_token"), 0)
    silent = {str(path) for path in job.inputs if path.is_file()}
    for batch in found:
        lengths = batch.lengths[batch.lengths > 0]
        for document in np.split(batch.ids, np.cumsum(lengths)[:-1]) if lengths.size else ():
            builder.add_item(torch.from_numpy(document))
            builder.end_document()
        counts["documents"] += lengths.size
        counts["empty"] += batch.lengths.size - lengths.size
        counts["tokens"] += batch.ids.size
        counts["longest"] = max(counts["longest"], int(lengths.max(initial=0)))
        counts["largest_token"] = max(counts["largest_token"], int(batch.ids.max(initial=0)))
        silent -= batch.paths
    if silent or not counts["tokens"]:
        names = sorted(silent) or map(str, job.inputs)
        raise ValueError(f"{', '.join(names)}: holds no text, expected at least one document")
    builder.finalize(str(written[".idx"]))
    return counts
