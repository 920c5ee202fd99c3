"""Bytes from outside, drawn by hypothesis: a parser takes them or refuses them with a message, and no more.

The address space is limited meanwhile, so that a header that claims any size cannot have it allocated.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from faults import scenes
from hypothesis import strategies as st
from safetensors.torch import save_file

from anchor_megatron.config import load_config, read_sections, save_config
from anchor_megatron.convert.hf_config import read_hf_config, read_model, write_hf_config
from anchor_megatron.convert.sources import open_source
from anchor_megatron.data.check import check_data_set
from anchor_megatron.data.documents import Documents, tokenizer_folder
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.data.tokenizer import load_tokenizer
from anchor_megatron.layout.cost import Machine, read_machine
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.training.manifest import MANIFEST, read_manifest, write_manifest
from anchor_megatron.training.safe_load import check_pickles

pytestmark = pytest.mark.faults

ROOM = 1 << 30  # bytes that a parser may take beyond what the process has
FILES = {  # parser: the file it is given, of the good ones below
    "index": "set.idx",
    "tokens": "set.bin",
    "summary": "set.json",
    "sources": "set_sources.npy",
    "jsonl": "text.jsonl",
    "tokenizer": "set_tokenizer/tokenizer.json",
    "safetensors": "model.safetensors",
    "safetensors index": "sharded/model.safetensors.index.json",
    "weights pickle": "pickled/pytorch_model.bin",
    "model configuration": "config.json",
    "manifest": f"checkpoint/{MANIFEST}",
    "metadata": "checkpoint/.metadata",
    "plain values": "checkpoint/common.pt",
    "checkpoint's configuration": "checkpoint/config.yaml",
    "configuration": "run.yaml",
    "plan's machine": "machine.json",
}
SLOW = {"jsonl": 5, "tokenizer": 5, "configuration": 2}  # so many times fewer cases


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def make_good(folder: Path) -> Path:
    """Puts a file that it takes before every parser."""
    scenes.make_data(folder)
    (folder / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / "model.safetensors")
    (folder / "sharded").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sharded" / "one.safetensors")
    shards = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(shards))
    (folder / "checkpoint").mkdir()
    torch.distributed.checkpoint.save({"a": torch.ones(3)}, checkpoint_id=folder / "checkpoint", no_dist=True)
    (folder / "pickled").mkdir()
    torch.save({"a": torch.ones(2, 3)}, folder / "pickled" / "pytorch_model.bin")
    (folder / "checkpoint" / "metadata.json").write_text("{}")
    torch.save({"step": 1, "state": {"losses": [1.0, 2.0]}}, folder / "checkpoint" / "common.pt")
    save_config(tiny_config(), folder / "checkpoint" / "config.yaml")
    shape = tiny_config(vocab_size=300).model
    hf = write_hf_config(shape, None, torch_dtype="float32", longest=64, token_ids={"bos_token_id": 0})
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "machine.json").write_text(json.dumps({"machine": asdict(Machine())}))
    write_manifest(folder / "checkpoint", step=1, known={})
    (folder / "run.yaml").write_text("data: {train: set, seq_length: 64}\ntrain: {steps: 3, seed: 5}\n")
    for name in FILES:
        parse(name, folder)  # as it is, each is taken
    return folder


def parse(name: str, folder: Path) -> None:
    """Has one parser read its file in `folder`."""
    path = folder / FILES[name]
    if name in ("index", "tokens", "summary", "sources"):
        documents = Documents(folder / "set")
        documents.tokens(0, 0, documents.lengths[0])
        tokenizer_folder(folder / "set")
    elif name == "tokenizer":
        load_tokenizer(path.parent)
    elif name == "jsonl":
        output = folder / "out" / "set"
        preprocess(Job((path,), output, tokenizer=folder / "set_tokenizer"))
    elif name == "safetensors":
        open_source(folder).close()
    elif name == "safetensors index":
        open_source(path.parent).close()
    elif name == "weights pickle":
        open_source(path.parent, allow_pickle=True).close()
    elif name == "model configuration":
        read_model(read_hf_config(path))
    elif name == "manifest":
        read_manifest(path.parent)
    elif name in ("metadata", "plain values"):
        check_pickles(path.parent)
    elif name == "checkpoint's configuration":
        read_sections(path)
    elif name == "plan's machine":
        read_machine(path)
    else:
        load_config(path)


@contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(name: str, good: Path, *, cases: int) -> int:
    """Gives one parser `cases` files; returns how many it refused. Anything but a ValueError goes up."""
    path = good / FILES[name]
    content, refused = path.read_bytes(), [0]

    @hypothesis.settings(max_examples=cases, deadline=None, database=None)
    @hypothesis.given(edited(content))
    def one(given: bytes) -> None:
        path.write_bytes(given)
        try:
            with little_memory():
                parse(name, good)
        except ValueError as error:
            assert names(str(error), path), f"got {error}, expected a refusal that names file or field"
            refused[0] += 1
        finally:
            shutil.rmtree(good / "out", ignore_errors=True)

    try:
        one()
    finally:
        path.write_bytes(content)
    return refused[0]


def names(message: str, path: Path) -> bool:
    """Whether a refusal says where to look: in a file, or in a configuration at a field."""
    field = re.match(r"[a-z]+\.[a-z0-9_]+: got ", message)
    return path.name in message or str(path.parent) in message or field is not None


def edited(content: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes; and `content` with a few places overwritten or its end cut off, which gets further."""
    words = st.sampled_from([b"-1", b"null", b"1e999", b"../"])
    numbers = st.integers(-(1 << 63), (1 << 63) - 1).map(lambda n: np.int64(n).tobytes())
    pieces = st.one_of(st.binary(min_size=1, max_size=9), numbers, words)
    places = st.one_of(st.integers(0, min(40, len(content))), st.integers(0, len(content)))

    def overwrite(edits: list[tuple[int, bytes]], cut: int) -> bytes:
        found = bytearray(content)
        for place, piece in edits:
            found[place : place + len(piece)] = piece
        return bytes(found[: len(found) - cut])

    edits = st.lists(st.tuples(places, pieces), max_size=4)
    return st.one_of(st.binary(max_size=100), st.builds(overwrite, edits, st.sampled_from([0, 0, 0, 1, 8])))


def test_a_flipped_bit_of_an_index_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Sequence lengths, where they lie, and document borders say the same three times over, and the look at a
    whole data set holds them against each other.
    """
    path = scenes.make_data(tmp_path).with_suffix(".idx")
    content = path.read_bytes()
    for place in range(0, len(content), 11):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        problems = check_data_set(tmp_path / "set")
        assert problems and re.search(r"set\.(idx|bin|json): ", problems[0]), place


@pytest.mark.parametrize("name", FILES)
def test_a_parser_takes_or_refuses(name: str, good: Path) -> None:
    assert fuzz(name, good, cases=60 // SLOW.get(name, 1)) > 0
