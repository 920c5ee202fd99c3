"""What cannot be used as data ends in one message that names the place, and leaves nothing behind."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.preprocess import Job, preprocess

SOURCES = Path(sysconfig.get_paths()["stdlib"]) / "json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the standard library's json package, with a tokenizer trained on it."""
    output = tmp_path_factory.mktemp("trained") / "set"
    preprocess(Job((SOURCES,), output, train_tokenizer=500, suffixes=(".py",)))
    return output


def bad_input(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: is empty"),
        ("bytes.txt", b"good \xff bad", "bytes.txt: byte 5 is not UTF-8"),
        ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "bytes.jsonl:2: byte 10 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl:2: is not JSON"),
        (
            "keys.jsonl",
            b'{"text": "a"}\n\n{"body": "b"}\n',
            r"keys.jsonl:3: got keys \['body'\], expected 'text'",
        ),
        ("list.jsonl", b'["a"]\n', "list.jsonl:1: got a JSON list"),
        ("binary.txt", b"good \0 bad", "binary.txt: got a NUL at character 5"),
        ("nul.jsonl", b'{"text": "a\\u0000"}\n', "nul.jsonl:1: got a NUL at character 1"),
        ("number.jsonl", b'{"text": 1}\n', "number.jsonl:1: got a int under 'text'"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "half.jsonl:2: got the lone surrogate"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1: is not JSON"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    trained: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = bad_input(tmp_path, name, content)
    job = Job(
        (SOURCES, path), tmp_path / "out", tokenizer=trained.parent / "set_tokenizer", suffixes=(".py",)
    )
    with pytest.raises(ValueError, match=message):
        preprocess(job)
    assert {one.name for one in tmp_path.iterdir()} == {name}


def test_a_worker_names_bad_input_too(trained: Path, tmp_path: Path) -> None:
    path = bad_input(tmp_path, "broken.jsonl", b'{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="broken.jsonl:2: is not JSON"):
        preprocess(Job((path,), tmp_path / "out", tokenizer=trained.parent / "set_tokenizer", workers=2))


def test_a_failed_run_leaves_the_data_set_that_was_there(trained: Path, tmp_path: Path) -> None:
    good, bad = bad_input(tmp_path, "a.txt", b"text"), bad_input(tmp_path, "b.txt", b"\xff")
    tokenizer = trained.parent / "set_tokenizer"
    preprocess(Job((good,), tmp_path / "out", tokenizer=tokenizer))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="b.txt: byte 0 is not UTF-8"):
        preprocess(Job((good, bad), tmp_path / "out", tokenizer=tokenizer, overwrite=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_bad_options_are_named(trained: Path, tmp_path: Path) -> None:
    tokenizer = trained.parent / "set_tokenizer"
    path = bad_input(tmp_path, "a.txt", b"text")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: holds no files ending in .md"):
        preprocess(Job((tmp_path / "nothing",), tmp_path / "out", tokenizer=tokenizer, suffixes=(".md",)))
    with pytest.raises(ValueError, match="tokenizer .*gone: no such folder"):
        preprocess(Job((path,), tmp_path / "out", tokenizer=tmp_path / "gone"))
    with pytest.raises(ValueError, match="tokenizer .*nothing: transformers cannot open it"):
        preprocess(Job((path,), tmp_path / "out", tokenizer=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="--workers: got 0"):
        preprocess(Job((path,), tmp_path / "out", tokenizer=tokenizer, workers=0))
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
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path}/bare: has neither BOS nor EOS"):
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
    with pytest.raises(ValueError, match="set.bin: got token id 499, expected ids below vocab_size = 400"):
        Documents(prefix, vocab_size=400)
    summary = json.loads((tmp_path / "set.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps({**summary, "documents": 1}))
    with pytest.raises(ValueError, match="set.json: got 1 documents .*: they are of different data sets"):
        Documents(prefix)
    (tmp_path / "set.json").write_text("[]")
    with pytest.raises(ValueError, match=r"set.json: got fields \[\], expected"):
        Documents(prefix)
    (tmp_path / "set.json").write_text(json.dumps(summary))
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


@pytest.mark.parametrize("vocab_size", [None, 600])
def test_a_damaged_token_is_named_when_it_is_read(
    trained: Path, tmp_path: Path, vocab_size: int | None
) -> None:
    prefix = copy_set(trained, tmp_path)
    documents = Documents(prefix, vocab_size=vocab_size)
    content = np.fromfile(tmp_path / "set.bin", dtype=np.uint16)
    content[documents.lengths[0] + 3] = 700
    content.tofile(tmp_path / "set.bin")
    windows = WindowDataset(documents, seq_length=64, anchor_token=0, seed=0)
    with pytest.raises(ValueError, match=f"set.bin: document 1: got token id 700, .* {vocab_size or 500}"):
        for n in range(windows.windows_per_epoch(0)):
            windows[n]


def test_windows_need_room_for_an_anchor_and_a_token(trained: Path) -> None:
    with pytest.raises(ValueError, match="data.seq_length: got 1"):
        WindowDataset(Documents(trained), seq_length=1, anchor_token=0, seed=0)
