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
    batch_encoder,
    encoder_source,
    load_tokenizer,
    train_tokenizer,
)

__all__ = ["Job", "preprocess"]


@dataclass(frozen=True)
class Job:
    """One preprocessing run. `inputs` are JSONL files, text files or folders of either."""

    inputs: tuple[Path, ...]
    output: Path
    """Prefix of the data set."""
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    tokenizer_out: Path | None = None
    """Folder that the tokenizer is copied to; PREFIX_tokenizer where None."""
    json_key: str = "text"
    suffixes: tuple[str, ...] = ()
    """Of the files taken from folders; all files where empty."""
    anchor_token: str | None = None
    append_eod: bool = False
    workers: int = 1
    overwrite: bool = False

    @property
    def finals(self) -> dict[str, Path]:
        """What the run writes: the tokenizer's folder and the data set's files, the summary last."""
        files = {suffix: Path(f"{self.output}{suffix}") for suffix in (".bin", ".idx", ".json")}
        return {"tokenizer": self.tokenizer_out or Path(f"{self.output}_tokenizer"), **files}


def preprocess(job: Job) -> tuple[Summary, float]:
    """Runs `job`; returns what was written and the seconds that tokenising took.

    Raises ValueError naming file and line, or the option, for input that cannot be used; nothing is written
    then.
    """
    _check(job)
    files = input_files(job.inputs, job.suffixes)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{job.output.name}.", dir=job.output.parent) as aside:
        written = {name: Path(aside) / f"data{name}" for name in job.finals}
        _provide_tokenizer(job, files, written["tokenizer"])
        summary, seconds = _tokenise(job, files, written)
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
    """Renames into place. A prefix without its summary is no data set: the old one goes first, the new one
    comes last.
    """
    finals[".json"].unlink(missing_ok=True)
    if finals["tokenizer"].exists():
        shutil.rmtree(finals["tokenizer"])
    finals["tokenizer"].parent.mkdir(parents=True, exist_ok=True)
    shutil.move(written["tokenizer"], finals["tokenizer"])  # --tokenizer-out may be on another disk
    for suffix in (".bin", ".idx", ".json"):
        os.replace(written[suffix], finals[suffix])


def _provide_tokenizer(job: Job, files: list[Path], folder: Path) -> None:
    """The tokenizer's folder, copied or trained."""
    if job.train_tokenizer is not None:
        texts = (record.text(job.json_key) for record in records(files))
        train_tokenizer(texts, vocab_size=job.train_tokenizer, folder=folder)
        return
    assert job.tokenizer is not None, "a job names its tokenizer or has one trained"
    load_tokenizer(job.tokenizer)
    shutil.copytree(job.tokenizer, folder)


def _tokenise(job: Job, files: list[Path], written: dict[str, Path]) -> tuple[Summary, float]:
    tokenizer = load_tokenizer(written["tokenizer"])
    anchor = anchor_token_id(tokenizer, job.anchor_token)
    if job.append_eod and tokenizer.eos_token_id is None:
        raise ValueError(f"--append-eod: the tokenizer {job.tokenizer} has no EOS token")
    make_encoder = partial(
        _make_encoder,
        encoder_source(tokenizer, written["tokenizer"]),
        job.json_key,
        np.dtype(DType.optimal_dtype(len(tokenizer))),
        [int(tokenizer.eos_token_id)] if job.append_eod else [],
    )
    total_bytes = sum(path.stat().st_size for path in files)
    started = time.perf_counter()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenising") as progress:
        found = encoded(make_encoder, batches(records(files)), workers=job.workers)
        counts = _write(job, _shown(found, progress), written)
    summary = Summary(
        **counts,
        vocab_size=len(tokenizer),
        anchor_token=anchor,
        tokenizer=os.path.relpath(job.finals["tokenizer"], job.output.parent),
        sources=[path.name for path in job.inputs],
    )
    summary.write(written[".json"])
    return summary, time.perf_counter() - started


def _make_encoder(source: str | Path, json_key: str, dtype: np.dtype, end: list[int]) -> Encoder:
    return Encoder(batch_encoder(source), json_key, dtype, end)


def _shown(found: Iterator[Encoded], progress: tqdm) -> Iterator[Encoded]:
    tokens = 0
    for batch in found:
        yield batch
        tokens += batch.ids.size
        progress.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        progress.update(batch.bytes_read)


def _write(job: Job, found: Iterator[Encoded], written: dict[str, Path]) -> dict[str, int]:
    """Writes .bin and .idx; the summary's counts. ValueError for an input file of no text."""
    builder: IndexedDatasetBuilder | None = None
    counts = dict.fromkeys(("documents", "tokens", "longest", "empty", "largest_token"), 0)
    silent = {str(path) for path in job.inputs if path.is_file()}
    for batch in found:
        builder = builder or IndexedDatasetBuilder(str(written[".bin"]), dtype=batch.ids.dtype.type)
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
    assert builder is not None, "tokens came in batches"
    builder.finalize(str(written[".idx"]))
    return counts
