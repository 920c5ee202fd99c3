"""A preprocessing run that was stopped goes on behind what is done, and is not mistaken for another."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.encode import Encoder
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.data.tokenizer import train_tokenizer
from anchor_megatron.data.unfinished import Unfinished

FILES = sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))
TEXTS = [path.read_text() for path in FILES if path.stat().st_size]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TEXTS, vocab_size=400, folder=folder)
    return folder


def test_a_run_goes_on_behind_the_files_that_are_done(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchor_megatron.data.preprocess._UNIT_BYTES", 1)
    for n, text in enumerate([*TEXTS, *TEXTS][:6]):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    job = Job((str(tmp_path / "*.jsonl"),), tmp_path / "out", tokenizer=tokenizer, source_from="file")
    preprocess(job)
    whole = {
        one: Path(f"{job.output}{one}").read_bytes() for one in (".bin", ".idx", ".json", "_sources.npy")
    }
    job = replace(job, output=tmp_path / "again")
    good = (tmp_path / "4.jsonl").read_bytes()
    (tmp_path / "4.jsonl").write_bytes(b"{")
    with pytest.raises(ValueError, match="4.jsonl:1: is not JSON"):
        preprocess(job)
    journal = (job.unfinished / "journal").read_bytes()
    assert len(journal.splitlines()) == 5 and not Path(f"{job.output}.json").exists()
    with (job.unfinished / "tokens").open("ab") as tokens:
        tokens.write(b"of a file that was not done")
    (job.unfinished / "journal").write_bytes(journal + b'{"files": [["torn')
    with pytest.raises(ValueError, match="4.jsonl:1: is not JSON"):
        preprocess(job)
    assert (job.unfinished / "journal").read_bytes() == journal
    (tmp_path / "4.jsonl").write_bytes(good)
    read: list[str] = []
    monkeypatch.setattr(Encoder, "__call__", _noting(read))
    preprocess(job)
    assert read == [str(tmp_path / f"{n}.jsonl:1") for n in (4, 5)], "only what was not done is read"
    for suffix, content in whole.items():
        assert Path(f"{job.output}{suffix}").read_bytes() == content.replace(b'"out_', b'"again_'), suffix
    assert not job.unfinished.exists()


def _noting(read: list[str]) -> Callable[..., Any]:
    encode = Encoder.__call__

    def call(self: Encoder, batch: Any) -> Any:
        read.extend(record.place for record in batch.records)
        return encode(self, batch)

    return call


def test_an_unfinished_run_of_other_settings_is_kept_until_told(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchor_megatron.data.preprocess._UNIT_BYTES", 1)
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    job = Job((tmp_path / "a.txt", tmp_path / "b.txt"), tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="b.txt: byte 0"):
        preprocess(job)
    changed = replace(job, append_eod=True)
    with pytest.raises(ValueError, match="holds an unfinished run of other append_eod; --overwrite"):
        preprocess(changed)
    damaged = job.unfinished / "tokens"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="run of tokens that differ from their checksum"):
        preprocess(job)
    (tmp_path / "b.txt").write_text("good now")
    assert preprocess(replace(changed, overwrite=True))[0].documents == 2


def test_two_runs_do_not_write_one_data_set(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    job = Job((tmp_path / "a.txt",), tmp_path / "out", tokenizer=tokenizer)
    other = Unfinished(job.unfinished)
    with pytest.raises(ValueError, match=r"\.out\.unfinished: another run is at work there"):
        preprocess(job)
    other.close(keep=False)
    assert preprocess(job)[0].documents == len(Documents(job.output)) == 1
