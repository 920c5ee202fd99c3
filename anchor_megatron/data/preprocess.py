"""Documents to Megatron's indexed format: read, tokenise in worker processes, write in input order.

    inputs -> files -> records (raw, with their places) -> workers: decode, parse, encode -> data set
    a.jsonl, src/      3 lines, 2 modules                           5 token arrays     PREFIX.bin .idx .json

The data set is written aside (unfinished.py) and renamed at the end, so that a failed run leaves none, and a
later one goes on behind the files that are done. It is the same whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from tqdm import tqdm

from anchor_megatron.data.documents import Summary
from anchor_megatron.data.encode import Batch, Encoded, Encoder
from anchor_megatron.data.inputs import InputFile, input_files
from anchor_megatron.data.pool import encoded
from anchor_megatron.data.readers import records
from anchor_megatron.data.records import Form, Record, Unusable, documents
from anchor_megatron.data.tokenizer import (
    anchor_token_id,
    encoder_source,
    load_tokenizer,
    train_tokenizer,
)
from anchor_megatron.data.unfinished import Unfinished, stamp

__all__ = ["Job", "preprocess"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*")
_BATCH_BYTES = 1 << 20  # of records that go to a worker at once
_UNIT_BYTES = 32 << 20  # of files that are done with together
_PLACES = 100  # of skipped records that the report names


@dataclass(frozen=True)
class Job:
    """One preprocessing run. `inputs` are files, folders and patterns (see `input_files`)."""

    inputs: tuple[str | Path, ...]
    output: Path
    """Prefix of the data set."""
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    text_key: str = "text"
    tokens_key: str | None = None
    source_key: str | None = None
    source_from: str | None = None
    suffixes: tuple[str, ...] = ()
    """Of the files taken from folders; all files where empty."""
    anchor_token: str | None = None
    append_eod: bool = False
    max_bytes: int = 256 << 20
    """Largest line or text."""
    on_error: str = "stop"
    """stop, or skip: records that cannot be used are counted and reported."""
    workers: int = 1
    overwrite: bool = False

    @property
    def finals(self) -> dict[str, Path]:
        """What the run writes; the summary, without which a prefix is no data set, last."""
        suffixes = ("_tokenizer", "_skipped.json", "_sources.npy", ".bin", ".idx", ".json")
        return {suffix: Path(f"{self.output}{suffix}") for suffix in suffixes}

    @property
    def form(self) -> Form:
        """Where rows keep what."""
        return Form(self.text_key, self.tokens_key, self.source_key)

    @property
    def unfinished(self) -> Path:
        """Where the run keeps what it has."""
        return self.output.parent / f".{self.output.name}.unfinished"

    @property
    def kept_tokenizer(self) -> Path:
        """The tokenizer's files there."""
        return self.unfinished / "tokenizer"


def preprocess(job: Job) -> tuple[Summary, float]:
    """Runs `job`; returns what was written, and the tokens a second that this run made.

    Raises ValueError naming file and place, or the option, for input that cannot be used; no data set is
    written then, and files that were done with are kept for the next run.
    """
    _check(job)
    files = input_files(job.inputs, job.suffixes, job.source_from)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    given = load_tokenizer(job.tokenizer) if job.tokenizer is not None else None
    settings = _settings(job, files, given)
    unfinished = Unfinished(job.unfinished)
    reason = unfinished.resume(settings, files)
    if reason is not None and not job.overwrite:
        unfinished.close(keep=True)
        raise ValueError(f"{job.unfinished}: holds an unfinished run of {reason}; --overwrite discards it")
    try:
        if not unfinished.files_done:
            _provide_tokenizer(job, files)
        tokenizer = load_tokenizer(job.kept_tokenizer) if given is None else given
        return _tokenise(job, files, tokenizer, unfinished, settings)
    finally:
        unfinished.close(keep=unfinished.files_done > 0)


def _check(job: Job) -> None:
    if (job.tokenizer is None) == (job.train_tokenizer is None):
        raise ValueError("--tokenizer: expected exactly one of --tokenizer DIR and --train-tokenizer N")
    if job.train_tokenizer is not None and job.tokens_key is not None:
        raise ValueError("--train-tokenizer: expected --tokenizer, as --tokens-key says there is no text")
    for name, value in (("workers", job.workers), ("max-bytes", job.max_bytes)):
        if value < 1:
            raise ValueError(f"--{name}: got {value}, expected at least 1")
    for path in job.finals.values():
        if path.exists() and not job.overwrite:
            raise ValueError(f"--output: {path} exists; give --overwrite to replace it")


def _settings(job: Job, files: list[InputFile], tokenizer: Any) -> dict[str, Any]:
    """What a run must have in common with an unfinished one to go on with it."""
    names = ("text_key", "tokens_key", "source_key", "source_from", "append_eod", "max_bytes", "on_error")
    settings: dict[str, Any] = {name: getattr(job, name) for name in names}
    if job.tokenizer is not None:
        source = encoder_source(tokenizer, job.tokenizer)
        settings["tokenizer"] = hashlib.sha256(str(source).encode()).hexdigest()
    else:  # it depends on all of the text
        settings |= {"train_tokenizer": job.train_tokenizer, "files": [stamp(file) for file in files]}
    return settings


def _provide_tokenizer(job: Job, files: list[InputFile]) -> None:
    """The tokenizer's files beside the output: copied, without a model's weights beside them, or trained."""
    shutil.rmtree(job.kept_tokenizer, ignore_errors=True)
    if job.tokenizer is not None:
        shutil.copytree(job.tokenizer, job.kept_tokenizer, ignore=shutil.ignore_patterns(*_WEIGHTS))
        return
    assert job.train_tokenizer is not None, "a job names its tokenizer or has one trained"
    train_tokenizer(_texts(job, files), vocab_size=job.train_tokenizer, folder=job.kept_tokenizer)


def _texts(job: Job, files: list[InputFile]) -> Iterator[str]:
    """All texts. Unusable records are passed over where they are to be skipped; tokenising counts them."""
    for record in itertools.chain.from_iterable(
        records(one, job.form, largest=job.max_bytes) for one in files
    ):
        try:
            yield from (text for text, _ in documents(record, job.form) if isinstance(text, str))
        except Unusable:
            if job.on_error == "stop":
                raise


def _tokenise(
    job: Job, files: list[InputFile], tokenizer: Any, unfinished: Unfinished, settings: dict[str, Any]
) -> tuple[Summary, float]:
    anchor = anchor_token_id(tokenizer, job.anchor_token)
    if job.append_eod and tokenizer.eos_token_id is None:
        raise ValueError(f"--append-eod: the tokenizer {job.tokenizer} has no EOS token")
    end = (int(tokenizer.eos_token_id),) if job.append_eod else ()
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # more than len() where ids have gaps
    dtype = np.dtype(DType.optimal_dtype(vocab_size))
    source = encoder_source(tokenizer, job.kept_tokenizer)
    make_encoder = partial(Encoder.open, source, job.form, dtype, vocab_size, end, job.on_error == "skip")
    unfinished.start(settings)
    started, before = time.perf_counter(), unfinished.counts.get("tokens", 0)
    with tqdm(unit="B", unit_scale=True, desc="tokenising") as progress:
        batches = _batches(job, files, unfinished.files_done)
        _write(files, encoded(make_encoder, batches, workers=job.workers), unfinished, progress)
    unfinished.files_done = 0  # nothing is left to go on with
    if not unfinished.counts["tokens"]:
        raise ValueError(f"{', '.join(map(str, job.inputs))}: holds no text, expected at least one document")
    summary = _finish(job, unfinished, dtype, vocab_size=vocab_size, anchor_token=anchor)
    return summary, (summary.tokens - before) / (time.perf_counter() - started)


def _finish(
    job: Job, unfinished: Unfinished, dtype: np.dtype, *, vocab_size: int, anchor_token: int
) -> Summary:
    """Summary and report, and all parts in their places."""
    parts, counts = unfinished.finish(dtype), unfinished.counts
    skipped = counts.pop("skipped")
    summary = Summary(
        **counts,
        skipped=sum(skipped["counts"].values()),
        vocab_size=vocab_size,
        anchor_token=anchor_token,
        tokenizer=job.finals["_tokenizer"].name,
        sources=unfinished.source_names,
        crc32=unfinished.crc32,
    )
    parts |= {"_tokenizer": job.kept_tokenizer, ".json": job.unfinished / "summary.json"}
    summary.write(parts[".json"])
    if summary.skipped:
        parts["_skipped.json"] = job.unfinished / "skipped.json"
        parts["_skipped.json"].write_text(json.dumps(skipped, indent=1) + "\n")
    _move(parts, job.finals)
    return summary


def _batches(job: Job, files: list[InputFile], first: int) -> Iterator[Batch]:
    """The records of `files` from number `first` on, about a mebibyte each. Files are done with some
    mebibytes at a time: a kill costs no more, many small ones no more notes.
    """
    own: list[Record] = []
    size = unit = 0
    for number, file in enumerate(files[first:], start=first + 1):
        for record in records(file, job.form, largest=job.max_bytes):
            own.append(record)
            size += record.size
            if size >= _BATCH_BYTES:
                yield Batch(own)
                own, size = [], 0
        unit += file.path.stat().st_size
        if unit >= _UNIT_BYTES or number == len(files):
            yield Batch(own, files_done=number)
            own, size, unit = [], 0, 0


def _write(files: list[InputFile], found: Iterator[Encoded], unfinished: Unfinished, progress: tqdm) -> None:
    """Appends what comes, counts it, and notes files as done."""
    if not unfinished.counts:
        names = ("documents", "tokens", "longest", "empty", "largest_token")
        unfinished.counts |= dict.fromkeys(names, 0) | {"skipped": {"counts": {}, "first": []}}
    counts = unfinished.counts
    for batch in found:
        unfinished.append(batch.ids, batch.lengths, batch.sources)
        counts["documents"] += batch.lengths.size
        counts["tokens"] += batch.ids.size
        counts["longest"] = max(counts["longest"], int(batch.lengths.max(initial=0)))
        counts["empty"] += batch.empty
        counts["largest_token"] = max(counts["largest_token"], int(batch.ids.max(initial=0)))
        for kind, message in batch.skipped:
            counts["skipped"]["counts"][kind] = counts["skipped"]["counts"].get(kind, 0) + 1
            counts["skipped"]["first"] += [message] if len(counts["skipped"]["first"]) < _PLACES else []
        progress.set_postfix_str(f"{counts['tokens']:,} tokens", refresh=False)
        progress.update(batch.size)
        if batch.files_done is not None:
            unfinished.commit(files[: batch.files_done])


def _move(parts: dict[str, Path], finals: dict[str, Path]) -> None:
    """Renames into place; an old summary goes first, so that no moment shows a mixture as a data set."""
    finals[".json"].unlink(missing_ok=True)
    if finals["_tokenizer"].exists():
        shutil.rmtree(finals["_tokenizer"])
    for suffix, path in finals.items():
        if suffix in parts:
            os.replace(parts[suffix], path)
        else:
            path.unlink(missing_ok=True)
