"""Every kind of input file, made by the tool that makes them elsewhere, gives the same tokens."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.encode import pieces
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.data.tokenizer import batch_encoder, load_tokenizer, train_tokenizer

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
FILES = sorted((LIBRARY / "json").glob("*.py")) + sorted((LIBRARY / "email").glob("*.py"))
TEXTS = [path.read_text() for path in FILES if path.stat().st_size]
ROWS = [{"text": text, "meta": {"set": "even" if n % 2 == 0 else "odd"}} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TEXTS, vocab_size=600, folder=folder)
    return folder


@pytest.fixture(scope="module")
def expected(tokenizer: Path) -> list[list[int]]:
    return load_tokenizer(tokenizer)(TEXTS, add_special_tokens=False)["input_ids"]


def tokens_of(prefix: Path) -> list[list[int]]:
    found = Documents(prefix)
    return [found.tokens(n, 0, length).tolist() for n, length in enumerate(found.lengths)]


def jsonl(path: Path) -> None:
    path.write_text(LINES)


def gzipped(path: Path) -> None:
    half = len(LINES) // 2  # two members, as `cat a.gz b.gz` makes
    path.write_bytes(gzip.compress(LINES[:half].encode()) + gzip.compress(LINES[half:].encode()))


def zstandard_frames(path: Path) -> None:
    packer, half = zstandard.ZstdCompressor(), len(LINES) // 2
    path.write_bytes(packer.compress(LINES[:half].encode()) + packer.compress(LINES[half:].encode()))


def parquet(path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"id": n, **row} for n, row in enumerate(ROWS)])
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def saved_dataset(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)


MAKERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": jsonl,
    "a.jsonl.gz": gzipped,
    "a.jsonl.zst": zstandard_frames,
    "a.parquet": parquet,
    "saved": saved_dataset,
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_rows_of_any_file_give_the_same_tokens_and_sources(
    name: str, tokenizer: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    MAKERS[name](tmp_path / name)
    job = Job((tmp_path / name,), tmp_path / "out", tokenizer=tokenizer, source_key="meta.set")
    summary, _ = preprocess(job)
    assert tokens_of(tmp_path / "out") == expected
    assert summary.sources == ["even", "odd"]
    found = Documents(tmp_path / "out").document_sources
    assert found is not None and found.tolist() == [n % 2 for n in range(len(TEXTS))]


def test_patterns_folders_and_sources_of_files(
    tokenizer: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    for name, begin in (("b", 0), ("a", 10)):
        (tmp_path / name).mkdir()
        for n, text in enumerate(TEXTS[begin : begin + 10]):
            (tmp_path / name / f"{n}.txt.gz").write_bytes(gzip.compress(text.encode()))
    inputs = (str(tmp_path / "b" / "[0-4].txt.gz"), tmp_path / "b" / "5.txt.gz", tmp_path / "a")
    summary, _ = preprocess(Job(inputs, tmp_path / "out", tokenizer=tokenizer, source_from="folder"))
    assert tokens_of(tmp_path / "out") == expected[:6] + expected[10:20]
    assert summary.sources == ["b", "a"]
    job = Job((tmp_path / "a",), tmp_path / "set", tokenizer=tokenizer, source_from="file", overwrite=True)
    assert preprocess(job)[0].sources == [str(n) for n in range(10)]
    with pytest.raises(ValueError, match="nothing.*: no such file or folder, and no pattern of any"):
        preprocess(Job((str(tmp_path / "nothing*"),), tmp_path / "x", tokenizer=tokenizer))


@pytest.mark.parametrize("as_lists", [False, True])
def test_rows_of_tokens_are_cut_at_their_document_ends(
    as_lists: bool, tokenizer: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    rows = []
    for first in range(0, len(expected), 4):
        own = expected[first : first + 4]
        ends = np.cumsum([len(one) for one in own]).tolist()
        source: Any = [{"end": end, "source": f"s{n % 2}", "start": 0} for n, end in enumerate(ends)]
        if as_lists:  # as datasets gives a sequence of objects
            source = {"end": ends, "source": [f"s{n % 2}" for n in range(len(ends))]}
        rows.append({"input_ids": [one for ids in own for one in ids], "source": source})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job((tmp_path / "a.jsonl",), tmp_path / "out", tokenizer=tokenizer, tokens_key="input_ids")
    summary, _ = preprocess(job)
    assert tokens_of(tmp_path / "out") == expected
    assert summary.sources == ["s0", "s1"]


def test_indexed_data_sets_are_joined(tokenizer: Path, expected: list[list[int]], tmp_path: Path) -> None:
    for name, ids in (("a", expected[:10]), ("b", expected[10:])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for one in ids:
            builder.add_item(torch.tensor(one))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    summary, _ = preprocess(
        Job((tmp_path,), tmp_path / "out" / "set", tokenizer=tokenizer, source_from="file")
    )
    assert tokens_of(tmp_path / "out" / "set") == expected
    assert (summary.sources, summary.documents) == (["a", "b"], len(expected))


BAD_LINES = {
    "not UTF-8": b'{"text": "\xff"}',
    "not JSON": b'{"text": ',
    "not an object": b'["a"]',
    "missing key": b'{"body": "a"}',
    "wrong type": b'{"text": 1}',
    "lone surrogate": b'{"text": "\\ud83d"}',
    "NUL byte": b'{"text": "a\\u0000b"}',
    "too large": b'{"text": "' + b"a" * 210_000 + b'"}',
}


def test_bad_records_are_counted_and_skipped(tokenizer: Path, tmp_path: Path) -> None:
    bad = list(BAD_LINES.values())
    lines = [line for n, line in enumerate(bad) for line in (b'{"text": "good %d"}' % n, line)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    whole = gzip.compress(LINES.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    frame = zstandard.ZstdCompressor().compress(LINES.encode())
    (tmp_path / "c.jsonl.zst").write_bytes(frame[: len(frame) // 2])
    parquet(tmp_path / "d.parquet")
    content = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(content[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "e.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "f.parquet")
    inputs = tuple(sorted(tmp_path.iterdir()))
    job = Job(inputs, tmp_path / "out", tokenizer=tokenizer, on_error="skip", max_bytes=200_000)
    summary, _ = preprocess(job)
    told = json.loads((tmp_path / "out_skipped.json").read_text())
    rows = {"damaged file": 3, "missing key": 2, "wrong type": 2}
    assert told["counts"] == {kind: rows.get(kind, 1) for kind in [*BAD_LINES, "damaged file"]}
    assert summary.skipped == sum(told["counts"].values()) == len(told["first"])
    places = " ".join(told["first"])
    for place in (
        "a.jsonl:2:",
        "a.jsonl:16:",
        "b.jsonl.gz: behind line",
        "c.jsonl.zst: behind line",
        "d.parquet",
    ):
        assert place in places, place
    assert "e.parquet: got columns ['body'], expected 'text' (--text-key)" in places
    assert "f.parquet: row 2: got a NoneType under 'text'" in places
    assert summary.documents > len(bad) + 1, "what lies before the damage is used"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(LINES.encode())[:9000],
            r"a.jsonl.gz: behind line \d+: cannot be unpacked",
        ),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: behind line 0: cannot be unpacked"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst: behind line 0: cannot be unpacked"),
        ("a.parquet", b"PAR1 no table", "a.parquet: cannot be read"),
        ("a.jsonl", b'{"text": "%s"}' % (b"a" * 300_000), "a.jsonl:1: got a line of over 200,000 bytes"),
        ("a.txt", b"a" * 300_000, "a.txt: got a text of over 200,000 bytes"),
        ("a.idx", b"MMIDIDX\x00\x00", "a.idx: got b'MMIDIDX"),
    ],
)
def test_bad_files_are_named(
    name: str, content: bytes, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess(Job((tmp_path / name,), tmp_path / "out", tokenizer=tokenizer, max_bytes=200_000))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": [1, 2], "source": [{"end": 3}]},
            r"'source': got \[3\], expected ends that rise within 2",
        ),
        ({"input_ids": [1, 2], "source": ["a"]}, "expected a list of objects with an integer 'end'"),
        ({"input_ids": [1, "a"]}, "'input_ids': expected integers"),
        ({"input_ids": [1, 600]}, "got token id 600, expected ids from 0 and below 600"),
        ({"input_ids": "a"}, "got a str under 'input_ids', expected a list of token ids"),
    ],
)
def test_bad_rows_of_tokens_are_named(
    row: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    job = Job((tmp_path / "a.jsonl",), tmp_path / "out", tokenizer=tokenizer, tokens_key="input_ids")
    with pytest.raises(ValueError, match=f"a.jsonl:1: .*{message}"):
        preprocess(job)


def test_some_documents_without_a_source_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2], "source": [{"end": 2, "source": "a"}]}, {"input_ids": [3]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job((tmp_path / "a.jsonl",), tmp_path / "out", tokenizer=tokenizer, tokens_key="input_ids")
    with pytest.raises(ValueError, match="1 of 2 documents have no source"):
        preprocess(job)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match="several: holds several data sets, expected one of them: train"):
        preprocess(Job((tmp_path / "several",), tmp_path / "out", tokenizer=tokenizer))
    datasets.Dataset.from_list(ROWS[:4]).save_to_disk(tmp_path / "chosen")
    state = json.loads((tmp_path / "chosen" / "state.json").read_text())
    state["_indices_files"] = [{"filename": "indices.arrow"}]  # as older releases left a selection
    (tmp_path / "chosen" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="chosen: rows were selected"):
        preprocess(Job((tmp_path / "chosen",), tmp_path / "out", tokenizer=tokenizer))


def test_long_texts_are_cut_where_no_token_changes(tokenizer: Path, tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in sorted(LIBRARY.glob("[a-d]*.py")))[:600_000]
    encode = batch_encoder((tokenizer / "tokenizer.json").read_text())
    parts = list(pieces(text, encode, size=20_000))
    assert "".join(parts) == text and len(parts) > 25
    assert [one for ids in encode(parts) for one in ids] == encode([text])[0]
    (tmp_path / "a.txt").write_text(text)
    preprocess(Job((tmp_path / "a.txt",), tmp_path / "out", tokenizer=tokenizer))
    assert tokens_of(tmp_path / "out") == encode([text])


def test_a_tokenizer_without_words_is_never_cut() -> None:
    """Llama-2's merges run over the whole text, which begins with a space of its own."""

    def tokens(texts: list[str]) -> list[list[int]]:
        return [[0, *map(ord, text)] for text in texts]

    text = "a line\nanother\n" * 4000
    assert list(pieces(text, tokens, size=10_000)) == [text]
