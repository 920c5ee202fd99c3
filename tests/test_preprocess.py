"""Preprocessing: real text in every form in, the same tokens out."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.encode import Batch, Encoder
from anchor_megatron.data.pool import encoded
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.data.records import Form, Record
from anchor_megatron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(sysconfig.get_paths()["stdlib"]) / "json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the standard library's json package, with a tokenizer trained on it."""
    output = tmp_path_factory.mktemp("trained") / "set"
    preprocess(Job((SOURCES,), output, train_tokenizer=500, suffixes=(".py",)))
    return output


def test_documents_decode_to_the_files(trained: Path) -> None:
    documents = Documents(trained)
    tokenizer = load_tokenizer(trained.parent / documents.summary.tokenizer)
    texts = [path.read_text() for path in sorted(SOURCES.rglob("*.py")) if path.stat().st_size]
    assert len(documents) == len(texts) == documents.summary.documents
    for number, text in enumerate(texts):
        assert tokenizer.decode(documents.tokens(number, 0, documents.lengths[number])) == text
    assert documents.summary.tokens == documents.lengths.sum()
    assert documents.summary.longest == documents.lengths.max()
    assert documents.summary.anchor_token == tokenizer.bos_token_id


def test_jsonl_and_text_and_workers_give_the_same_tokens(trained: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"body": path.read_text()}) for path in sorted(SOURCES.rglob("*.py"))]
    (tmp_path / "set.jsonl").write_text("\n\n".join(lines))
    tokenizer = trained.parent / "set_tokenizer"
    output = tmp_path / "jsonl"
    preprocess(Job((tmp_path / "set.jsonl",), output, tokenizer=tokenizer, text_key="body", workers=2))
    for suffix in (".bin", ".idx"):
        assert Path(f"{output}{suffix}").read_bytes() == Path(f"{trained}{suffix}").read_bytes()


def test_append_eod_ends_every_document(trained: Path, tmp_path: Path) -> None:
    tokenizer = trained.parent / "set_tokenizer"
    preprocess(Job((SOURCES,), tmp_path / "eod", tokenizer=tokenizer, suffixes=(".py",), append_eod=True))
    plain, ended = Documents(trained), Documents(tmp_path / "eod")
    assert np.array_equal(ended.lengths, plain.lengths + 1)
    eos = load_tokenizer(tokenizer).eos_token_id
    assert all(ended.tokens(i, length - 1, length)[0] == eos for i, length in enumerate(ended.lengths))


def test_documents_without_text_are_left_out_and_counted(trained: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("", "one", " \n", "two")]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty.txt").touch()
    (tmp_path / "folder" / "three.txt").write_text("three")
    inputs = (tmp_path / "some.jsonl", tmp_path / "folder")
    job = Job(inputs, tmp_path / "out", tokenizer=trained.parent / "set_tokenizer", append_eod=True)
    summary, _ = preprocess(job)
    assert (summary.documents, summary.empty, summary.sources) == (3, 3, [])
    assert (Documents(tmp_path / "out").lengths > 1).all(), "an EOS alone is no document"


def test_overwriting_replaces_the_whole_set(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    model = shutil.copytree(trained.parent / "set_tokenizer", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"weights")
    job = Job((tmp_path / "a.txt",), tmp_path / "sets" / "out", tokenizer=model)
    preprocess(job)
    kept = tmp_path / "sets" / "out_tokenizer"
    assert {path.name for path in kept.iterdir()} == {path.name for path in model.iterdir()} - {
        "model.safetensors"
    }
    (tmp_path / "a.txt").write_text("text of another length")
    preprocess(replace(job, overwrite=True, tokenizer=kept))  # its own output is a tokenizer like any other
    documents = Documents(tmp_path / "sets" / "out")
    assert (
        load_tokenizer(kept).decode(documents.tokens(0, 0, documents.lengths[0])) == "text of another length"
    )
    assert {path.name for path in kept.parent.iterdir()} == {
        "out.bin",
        "out.idx",
        "out.json",
        "out_tokenizer",
    }


def test_workers_keep_the_order_and_read_little_ahead(trained: Path) -> None:
    source = (trained.parent / "set_tokenizer" / "tokenizer.json").read_text()
    make_encoder = partial(Encoder.open, source, Form(), np.dtype(np.int32), 500, (), False)
    read = []

    def batches() -> Iterator[Batch]:
        for number in range(24):
            read.append(number)  # every other batch takes a worker longer
            yield Batch([Record(str(number), b"def %d(): pass\n" % number * (1, 5000)[number % 2])])

    expected = [one.ids for one in encoded(make_encoder, batches(), workers=1)]
    read.clear()
    results = encoded(make_encoder, batches(), workers=2)
    found = [next(results).ids]
    assert len(read) <= 8, "at most four batches a worker wait in memory"
    found += [one.ids for one in results]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_worker_that_dies_ends_the_run() -> None:
    with pytest.raises(BrokenProcessPool):
        list(encoded(partial(os._exit, 3), iter([Batch([Record("a", b"x")])]), workers=2))


def test_the_command_prints_a_summary_or_one_message(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = ROOT / "tools" / "preprocess_data.py"
    words = [str(tool), str(SOURCES), "--suffix", ".py", "--output", str(tmp_path / "out")]
    words += ["--tokenizer", str(trained.parent / "set_tokenizer"), "--workers", "2"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "documents" in done.stdout and "tokens/s" in done.stdout, done.stderr
    monkeypatch.setattr(sys, "argv", words)
    assert runpy.run_path(str(tool))["main"]() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("preprocess_data.py: --output: ") and printed.err.count("\n") == 1
