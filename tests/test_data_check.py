"""Damaged data sets: `inspect_data.py check` names file and document; what is not whole is not read."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from test_inspect_data import paragraphs, tool
from test_packing import write_documents

from anchor_megatron.data import index
from anchor_megatron.data.check import check_data_set
from anchor_megatron.data.documents import Documents, Summary


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paragraphs(tmp_path_factory.mktemp("data") / "set")


def put(suffix: str, dtype: type, entry: int, value: int) -> Callable[[Path], None]:
    """Writes one number into a file: into the .bin, or behind the .idx's header by array."""

    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}{'.idx' if suffix in ARRAYS else suffix}")
        documents = Summary.read(Path(f"{prefix}.json")).documents
        offset = ARRAYS[suffix](documents) if suffix in ARRAYS else 0
        content = bytearray(path.read_bytes())
        size = np.dtype(dtype).itemsize
        content[offset + entry * size : offset + (entry + 1) * size] = dtype(value).tobytes()
        path.write_bytes(content)

    return damage


ARRAYS = {"lengths": lambda n: 34, "pointers": lambda n: 34 + 4 * n, "borders": lambda n: 34 + 12 * n}


def told(**fields: int | str) -> Callable[[Path], None]:
    """Changes fields of the summary."""

    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def sources(content: bytes | np.ndarray) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        if isinstance(content, bytes):
            Path(f"{prefix}_sources.npy").write_bytes(content)
        else:
            count = Summary.read(Path(f"{prefix}.json")).documents
            np.save(f"{prefix}_sources.npy", np.resize(content, count))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(f"{p}.bin", 100), r"set\.bin: got 100 bytes, expected the \d+"),
        (put(".bin", np.uint16, 100, 700), r"set\.bin: document \d+, its token \d+: got id 700, expected"),
        (put("pointers", np.int64, 4, 6), r"set\.idx: document 4: got \d+ tokens from byte 6 of .* expected"),
        (put("pointers", np.int64, 4, -6), r"set\.idx: document 4: got \d+ tokens from byte -6"),
        (put("lengths", np.int32, 4, -6), r"set\.idx: document 4: got -6 tokens"),
        (put("lengths", np.int32, 4, 10**6), r"set\.idx: document 5: got \d+ tokens from byte \d+ of"),
        (put("borders", np.int64, 4, 9), r"set\.idx: document 3: got borders that do not rise as those"),
        (put("borders", np.int64, 4, 3), r"set\.idx: document 3: got borders that do not rise as those"),
        (put("borders", np.int64, 0, 1), r"set\.idx: document borders do not rise from 0"),
        (sources(np.array([0, -1])), r"set_sources\.npy: got int64 \(\d+,\), expected for each of"),
        (sources(np.array([0, 2], dtype=np.uint8)), r"set_sources\.npy: got uint8"),
        (sources(b"nothing"), r"set_sources\.npy: expected an array in numpy's format"),
        (sources(b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', "), r"set_sources\.npy: expected an array"),
        (sources(b"PK\x03\x04"), r"set_sources\.npy: expected an array in numpy's format"),
        (told(longest=3), r"set\.json: longest: got 3, but the index has \d+"),
        (told(largest_token=3), r"set\.json: largest_token: got 3, but .*set\.bin has \d+"),
        (told(vocab_size=310), r"set\.json: vocab_size: got 310, but its tokenizer has 300"),
        (told(crc32=1), r"set\.bin: got bytes of CRC-32 \d+, expected 1 as when"),
        (told(anchor_token=300), r"set\.json: anchor_token: got 300, but its tokenizer has 300"),
        (told(tokenizer="gone"), r"tokenizer .*gone: no such folder"),
        (lambda p: Path(f"{p}.json").write_text("{"), r"set\.json: "),
    ],
)  # fmt: skip
def test_damage_is_named(
    prefix: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    for path in prefix.parent.glob("set*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    copy = tmp_path / "set"
    assert check_data_set(copy) == []
    damage(copy)
    assert tool.main([str(copy), "check"]) == 1
    printed = capsys.readouterr().err
    assert re.match(f"inspect_data.py: .*{message}", printed), printed
    assert printed.count("\n") == 1, "one thing is wrong"


def test_the_document_of_a_wrong_id_is_the_one_that_holds_it(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [3, 0, 4, 2])
    ids = np.fromfile(tmp_path / "set.bin", dtype=np.int32)
    ids[6] = -5
    ids.tofile(tmp_path / "set.bin")
    problems = check_data_set(tmp_path / "set")
    assert "set.bin: document 2, its token 3: got id -5, expected ids from 0 and below" in problems[0]
    with pytest.raises(ValueError, match="set.bin: document 2: got token id -5"):
        Documents(tmp_path / "set").tokens(2, 0, 4)


def test_an_index_whose_parts_differ_is_refused_before_it_is_used(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [3, 4, 2, 5])
    put("pointers", np.int64, 2, 4)(tmp_path / "set")
    for use in (lambda one: one.lengths, lambda one: one.tokens(0, 0, 3)):
        with pytest.raises(ValueError, match=r"set.idx: document 2: got 2 tokens from byte 4 of .* at 28"):
            use(Documents(tmp_path / "set"))
    put("pointers", np.int64, 3, 13)(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set.idx: got 33 bytes of tokens, expected a multiple of 4"):
        Documents(tmp_path / "set")


def test_documents_of_several_sequences_are_their_tokens_one_after_another(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.int32)
    for document in ([[2, 3], [4]], [], [[5, 6, 7]], [[8], [9, 10]], [], []):
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(tmp_path / "set.idx"))
    counts = dict(documents=6, tokens=9, longest=3, empty=0, largest_token=10, vocab_size=11, anchor_token=1)
    Summary(**counts, tokenizer="none", sources=[]).write(tmp_path / "set.json")
    documents = Documents(tmp_path / "set")
    assert documents.lengths.tolist() == [3, 0, 3, 3, 0, 0]
    assert documents.tokens([3, 0, 5, 2], [0, 1, 0, 0], [3, 3, 0, 1]).tolist() == [8, 9, 10, 3, 4, 5]


def test_a_flipped_bit_of_an_index_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_PART", 4)
    write_documents(tmp_path / "set", [3, 0, 4, 2, 7, 1, 1, 5, 9, 6])
    content = (tmp_path / "set.idx").read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "set.idx").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set\.(idx|bin|json): "):
            _ = Documents(tmp_path / "set").lengths


def test_an_index_of_a_hundred_million_documents_is_not_read_to_open_it(tmp_path: Path) -> None:
    """The files are holes, but for what opening looks at."""
    count, tokens = 100_000_000, 10**9
    with (tmp_path / "set.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, count, count + 1))
        for end, value in ((34 + 12 * count, 4 * tokens), (34 + 20 * count + 8, count)):
            file.seek(end - 8)
            file.write(struct.pack("<q", value))
    (tmp_path / "set.bin").touch()
    os.truncate(tmp_path / "set.bin", 4 * tokens)
    counts = dict(documents=count, tokens=tokens, longest=0, empty=0, largest_token=0)
    Summary(**counts, vocab_size=9, anchor_token=1, tokenizer="none", sources=[]).write(tmp_path / "set.json")
    held = psutil.Process().memory_info().rss
    started = time.perf_counter()
    documents = Documents(tmp_path / "set")
    assert len(documents) == count
    assert time.perf_counter() - started < 2
    assert psutil.Process().memory_info().rss - held < 2**26
