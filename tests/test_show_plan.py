"""The printed plan, read back: it covers every token once, and what is sent is what is awaited."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import Packing, WindowDataset
from anchor_megatron.data.preprocess import Job, preprocess

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [5, 9, 1, 40, 9]

RANK = re.compile(r"rank (\d+): area (\d+), (\d+) rows attend at once, (\d+) wait for (\d+) rows")
PIECE = re.compile(
    r"rows +(\d+)-(\d+) +document (\d+), its tokens (\d+)-(\d+) "
    r"\(window (\d+)-(\d+), positions ([\d, -]+)\) +"
    r"(?:local|waits: keys (\d+)-(\d+) from (.*?)) +area (\d+)"
)
SEND = re.compile(r"sends (\d+) rows to rank (\d+): window ([\d, -]+)")


@dataclass
class Piece:
    rows: range
    document: int
    own: range  # of the document's tokens
    window: range
    positions: list[int]
    keys: range | None
    holders: dict[int, int]
    area: int


@dataclass
class Rank:
    area: int
    at_once: int
    waiting: int
    awaited: int
    pieces: list[Piece] = field(default_factory=list)
    sends: dict[int, list[int]] = field(default_factory=dict)


def show_plan(*words: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/show_plan.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def spans(text: str) -> list[int]:
    """ "0, 5-8" -> 0 5 6 7"""
    values: list[int] = []
    for span in text.split(", "):
        start, _, stop = span.partition("-")
        values += range(int(start), int(stop or int(start) + 1))
    return values


def read(text: str) -> list[Rank]:
    ranks: list[Rank] = []
    for line in text.splitlines()[1:]:
        if found := RANK.fullmatch(line):
            assert int(found[1]) == len(ranks)
            ranks.append(Rank(*map(int, found.groups()[1:])))
        elif found := PIECE.fullmatch(line.strip()):
            row, end, document, *bounds = (int(number) for number in found.groups()[:7])
            ranks[-1].pieces.append(
                Piece(
                    rows=range(row, end),
                    document=document,
                    own=range(*bounds[:2]),
                    window=range(*bounds[2:]),
                    positions=spans(found[8]),
                    keys=range(int(found[9]), int(found[10])) if found[9] else None,
                    holders={int(r): int(n) for r, n in re.findall(r"rank (\d+) \((\d+)\)", found[11] or "")},
                    area=int(found[12]),
                )
            )
        elif found := SEND.fullmatch(line.strip()):
            ranks[-1].sends[int(found[2])] = spans(found[3])
            assert len(spans(found[3])) == int(found[1])
        else:
            assert not line, f"a line that says nothing of the plan: {line!r}"
    return ranks


@pytest.fixture(scope="module")
def ranks() -> list[Rank]:
    shown = show_plan("--lengths", ",".join(map(str, LENGTHS)), "--cp", "4")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("64 tokens, 5 documents, 4 ranks of 16 tokens; balance ")
    return read(shown.stdout)


def test_every_token_is_held_once(ranks: list[Rank]) -> None:
    held = [token for rank in ranks for piece in rank.pieces for token in piece.window]
    assert sorted(held) == list(range(64))
    for rank in ranks:
        assert [row for piece in rank.pieces for row in piece.rows] == list(range(16))
        assert rank.at_once + rank.waiting == 16
        assert all(len(piece.rows) == len(piece.window) == len(piece.own) for piece in rank.pieces)


def test_pieces_are_where_their_documents_are(ranks: list[Rank]) -> None:
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    for rank in ranks:
        for piece in rank.pieces:
            assert piece.window.start - piece.own.start == starts[piece.document]
            assert piece.own.stop <= LENGTHS[piece.document]
            # an anchor stands at 0; token j of document d at j plus the tokens before d that are no anchors
            before = starts[piece.document] - piece.document
            assert piece.positions == [0 if token == 0 else before + token for token in piece.own]


def test_what_is_sent_is_what_is_awaited(ranks: list[Rank]) -> None:
    owner = {token: rank for rank, one in enumerate(ranks) for piece in one.pieces for token in piece.window}
    for number, rank in enumerate(ranks):
        keys = {token for piece in rank.pieces if piece.keys is not None for token in piece.keys}
        awaited = sorted(token for token in keys if owner[token] != number)
        arriving = [
            (sender, token) for sender, one in enumerate(ranks) for token in one.sends.get(number, [])
        ]
        assert sorted(token for _, token in arriving) == awaited
        assert len(awaited) == rank.awaited > 0
        assert all(owner[token] == sender for sender, token in arriving)
        assert number not in rank.sends


def test_keys_run_from_the_document_s_start_to_the_piece_s_end(ranks: list[Rank]) -> None:
    owner = {token: rank for rank, one in enumerate(ranks) for piece in one.pieces for token in piece.window}
    for rank in ranks:
        waits = [piece.keys is not None for piece in rank.pieces]
        assert waits == sorted(waits), "local pieces come first"
        for piece in rank.pieces:
            assert (piece.keys is None) == (piece.own.start == 0)
            if piece.keys is not None:
                assert piece.keys == range(sum(LENGTHS[: piece.document]), piece.window.stop)
                holders = [owner[token] for token in piece.keys]
                assert piece.holders == {number: holders.count(number) for number in set(holders)}


def test_areas_add_up(ranks: list[Rank]) -> None:
    for rank in ranks:
        for piece in rank.pieces:
            assert piece.area == sum(token + 1 for token in piece.own)
        assert rank.area == sum(piece.area for piece in rank.pieces)
    assert sum(rank.area for rank in ranks) == sum(length * (length + 1) // 2 for length in LENGTHS)


def test_modes_and_placements_are_honoured() -> None:
    shown = show_plan("--lengths", "5,3", "--cp", "2", "--mode", "full", "--placement", "contiguous")
    first, second = read(shown.stdout)
    assert [(piece.window, piece.positions) for piece in first.pieces] == [(range(4), [0, 1, 2, 3])]
    assert [(piece.window, piece.keys) for piece in second.pieces] == [(range(4, 8), range(8))]
    shown = show_plan("--lengths", "5,3", "--cp", "2", "--mode", "document_reset", "--placement", "zigzag")
    assert {piece.document: piece.positions for piece in read(shown.stdout)[1].pieces} == {
        0: [2, 3, 4],
        1: [0],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "5,x", "--cp", "2"], "--lengths: got '5,x', expected whole numbers of at least 1"),
        (["--lengths", "5,0", "--cp", "2"], "--lengths: got '5,0', expected whole numbers of at least 1"),
        (["--lengths", "5,2", "--cp", "2"], "got 7, expected a multiple of context_parallel_size = 2"),
        (["--lengths", "5,3", "--cp", "0"], "--cp: got 0, expected at least 1"),
        (["--lengths", "5,3", "--cp", "2", "--window", "-1"], "--window: got -1, expected at least 0"),
        (["--data", "none", "--cp", "2"], "none.bin: no such file"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(words: list[str], message: str) -> None:
    shown = show_plan(*words)
    assert shown.returncode == 2
    assert shown.stderr.startswith("show_plan.py: ") and shown.stderr.count("\n") == 1
    assert message in shown.stderr


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    shown = show_plan("--lengths", "5,9,1,40,9", "--cp", "4", "--plot", tmp_path / "plan.png")
    assert shown.returncode == 0, shown.stderr
    head = (tmp_path / "plan.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    assert width > 1000 and height > 300


def test_a_window_of_a_data_set_is_shown(tmp_path: Path) -> None:
    sources = Path(sysconfig.get_paths()["stdlib"]) / "json"
    preprocess(Job((sources,), tmp_path / "set", train_tokenizer=500, suffixes=(".py",)))
    documents = Documents(tmp_path / "set")
    anchor, packing = documents.summary.anchor_token, Packing(shuffle=True)
    windows = WindowDataset(documents, seq_length=4096, anchor_token=anchor, seed=7, packing=packing)
    lengths = ",".join(map(str, np.diff(windows[1].cu_seqlens)))
    assert "," in lengths, "a window of several documents shows more"
    shown = show_plan("--data", tmp_path / "set", "--seq-length", 4096, "--seed", 7, "--window", 1, "--cp", 4)
    assert shown.stdout == show_plan("--lengths", lengths, "--cp", 4).stdout
