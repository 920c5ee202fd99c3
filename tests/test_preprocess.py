"""Preprocessing: real text in every form in, the same tokens out, and one clear message for what cannot be
used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.preprocess import Job, preprocess
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
    preprocess(Job((tmp_path / "set.jsonl",), output, tokenizer=tokenizer, json_key="body", workers=2))
    for suffix in (".bin", ".idx"):
        assert Path(f"{output}{suffix}").read_bytes() == Path(f"{trained}{suffix}").read_bytes()


def test_append_eod_ends_every_document(trained: Path, tmp_path: Path) -> None:
    tokenizer = trained.parent / "set_tokenizer"
    preprocess(Job((SOURCES,), tmp_path / "eod", tokenizer=tokenizer, suffixes=(".py",), append_eod=True))
    plain, ended = Documents(trained), Documents(tmp_path / "eod")
    assert np.array_equal(ended.lengths, plain.lengths + 1)
    eos = load_tokenizer(tokenizer).eos_token_id
    assert all(ended.tokens(i, length - 1, length)[0] == eos for i, length in enumerate(ended.lengths))


def bad_input(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: is empty"),
        ("blank.jsonl", b'{"text": ""}\n', "holds no text"),
        ("bytes.txt", b"good \xff bad", "bytes.txt: byte 5 is not UTF-8"),
        ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "bytes.jsonl:2: byte 10 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl:2: is not JSON"),
        ("keys.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "keys.jsonl:3: got keys"),
        ("list.jsonl", b'["a"]\n', "list.jsonl:1: got list"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_named_and_leaves_nothing(
    trained: Path, tmp_path: Path, name: str, content: bytes, message: str, workers: int
) -> None:
    if workers == 2 and name != "broken.jsonl":
        pytest.skip("one message is enough to see that errors travel from workers")
    path = bad_input(tmp_path, name, content)
    job = Job((path,), tmp_path / "out", tokenizer=trained.parent / "set_tokenizer", workers=workers)
    with pytest.raises(ValueError, match=message):
        preprocess(job)
    assert {one.name for one in tmp_path.iterdir()} == {name}


def test_bad_options_are_named(trained: Path, tmp_path: Path) -> None:
    tokenizer = trained.parent / "set_tokenizer"
    path = bad_input(tmp_path, "a.txt", b"text")
    with pytest.raises(ValueError, match="no such file or folder"):
        preprocess(Job((tmp_path / "gone.txt",), tmp_path / "out", tokenizer=tokenizer))
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        preprocess(Job((path,), trained, tokenizer=tokenizer))
    with pytest.raises(ValueError, match="expected a token of"):
        preprocess(Job((path,), tmp_path / "out", tokenizer=tokenizer, anchor_token="<nothing>"))
    with pytest.raises(ValueError, match="expected at least 258"):
        preprocess(Job((path,), tmp_path / "out", train_tokenizer=100))


def test_a_tokenizer_without_bos_and_eos_needs_a_named_anchor(trained: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_file=str(trained.parent / "set_tokenizer" / "tokenizer.json"))
    bare.save_pretrained(str(tmp_path / "bare"))
    path = bad_input(tmp_path, "a.txt", b"text")
    with pytest.raises(ValueError, match="has neither BOS nor EOS"):
        preprocess(Job((path,), tmp_path / "out", tokenizer=tmp_path / "bare"))
    summary, _ = preprocess(Job((path,), tmp_path / "out", tokenizer=tmp_path / "bare", anchor_token="e"))
    assert summary.anchor_token == bare.get_vocab()["e"]


def copy_set(trained: Path, folder: Path) -> Path:
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"set{suffix}").write_bytes(Path(f"{trained}{suffix}").read_bytes())
    return folder / "set"


def test_damaged_data_sets_are_named(trained: Path, tmp_path: Path) -> None:
    prefix = copy_set(trained, tmp_path)
    whole = (tmp_path / "set.bin").read_bytes()
    (tmp_path / "set.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=rf"set.bin: got {len(whole) - 2} bytes, expected the {len(whole)}"):
        Documents(prefix)
    (tmp_path / "set.bin").write_bytes(whole)
    with pytest.raises(
        ValueError, match="set.bin: got token id 499, expected ids below the model's vocab_size = 400"
    ):
        Documents(prefix, vocab_size=400)
    index = (tmp_path / "set.idx").read_bytes()
    (tmp_path / "set.idx").write_bytes(index[:-1])
    with pytest.raises(ValueError, match="set.idx: got"):
        Documents(prefix)
    (tmp_path / "set.idx").write_bytes(b"x" * 64)
    with pytest.raises(ValueError, match="expected an index of Megatron's format"):
        Documents(prefix)
    (tmp_path / "set.json").unlink()
    with pytest.raises(ValueError, match="set.json: no such file"):
        Documents(prefix)


def test_windows_need_room_for_an_anchor_and_a_token(trained: Path) -> None:
    with pytest.raises(ValueError, match="data.seq_length: got 1"):
        WindowDataset(Documents(trained), seq_length=1, anchor_token=0, seed=0)


def test_the_command_prints_a_summary_or_one_message(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), str(SOURCES), "--suffix", ".py"]
    command += ["--tokenizer", str(trained.parent / "set_tokenizer"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "documents" in done.stdout and "tokens/s" in done.stdout, done.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert (
        again.returncode == 2
        and "exists; give --overwrite" in again.stderr
        and "Traceback" not in again.stderr
    )
