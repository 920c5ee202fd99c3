"""`tools/profile_cp.py`: what is simulated adds up, what is measured is fitted, reports stand alone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from anchor_megatron.layout.cost import CostModel, LayerShape, Machine, read_machine
from anchor_megatron.layout.exchanges import EXCHANGES
from anchor_megatron.layout.placement import PLACEMENTS, balance, place, received_rows
from anchor_megatron.profiling.clock import slowest, timed
from anchor_megatron.profiling.predict import predict, seconds_of_one_rank
from anchor_megatron.profiling.report import write_report
from anchor_megatron.profiling.rivals import place_chunks, predict_every_document_everywhere
from anchor_megatron.profiling.simulate import Settings, simulate
from anchor_megatron.profiling.sweep import Sweep, add_predictions, sweep
from anchor_megatron.profiling.windows import draw_window
from anchor_megatron.testing.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "document_lengths.csv"
SHAPE = LayerShape(heads=4, groups=2, head_dim=16, bytes_per_value=4)


class Report(HTMLParser):
    """What a page is made of, and where it points."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the tool prints for three sizes on nodes of two ranks, and where it wrote."""
    output = tmp_path_factory.mktemp("report") / "small"
    words = ["--simulate", "--cp", "2", "4", "8", "--windows", "2", "--ranks-per-node", "2"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "profile_cp.py", *words, "--output", output],
        capture_output=True, text=True, timeout=120, cwd=output.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, output


def test_the_table_has_achieved_target_and_bound(simulated: tuple[str, Path]) -> None:
    printed, output = simulated
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    for ranks, targets in {2: ("1.01 (1.03)", "0.080"), 8: ("1.02 (1.05)", "0.150")}.items():
        [line] = re.findall(rf"^ +{ranks} \| [\d.]+ \(.*$", printed, flags=re.MULTILINE)
        [row] = [row for row in rows if row["ranks"] == ranks and "least_received" in row]
        assert all(target in line for target in targets)
        assert f"{row['balance']:.4f} ({row['worst_balance']:.4f})" in line
        assert f"{row['needed']:.4f} ({row['worst_needed']:.4f})" in line
        assert row["least_balance"] <= row["balance"] and row["least_received"] <= row["needed"]


def test_the_report_stands_alone(simulated: tuple[str, Path]) -> None:
    text = simulated[1].with_suffix(".html").read_text()
    report = Report(text)
    assert report.tags.count("img") == 4 and report.tags.count("table") == 2
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in report.references)
    assert not {"script", "link", "iframe"} & set(report.tags) and "url(" not in text


def test_every_row_adds_up(simulated: tuple[str, Path]) -> None:
    rows = json.loads(simulated[1].with_suffix(".json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"ours", "TransformerEngine THD", "shuffled chunks"}
    assert {row["placement"] for row in rows if row["name"] == "ours"} == set(PLACEMENTS)
    ours = {(row["ranks"], row["exchange"]): row for row in rows if row["placement"] == "document"}
    for ranks in (4, 8):
        direct, taken = ours[ranks, "direct"], ours[ranks, "sparse"]
        assert direct["two_levels"] == 0 and direct["head_parts"] == 1
        assert taken["two_levels"] > 0 and taken["received"] >= direct["received"]
        assert taken["total_ms"] < direct["total_ms"]
    for row in rows:
        assert row["total_ms"] == pytest.approx(row["forward_ms"] + row["backward_ms"])
        assert row["total_ms"] == pytest.approx(row["attention_ms"] + row["not_hidden_ms"])
        assert 0 < row["efficiency"] < 1 <= row["balance"] <= row["worst_balance"]
        if "across_one_level_mb" in row:
            assert (row["across_one_level_mb"] > 0) == (row["across_two_levels_mb"] > 0)
            assert row["across_two_levels_mb"] <= row["across_one_level_mb"]
            assert row["two_levels"] == 0 or row["across_two_levels_mb"] < row["across_one_level_mb"]
    header, *lines = simulated[0].split("\n\n")[1].splitlines()
    assert header.endswith("two levels  parts  MB across: one level  two levels")
    for row, line in zip(rows, lines, strict=True):
        across = re.findall(r" \d+% +[\d.]+ +([\d.]+) +([\d.]+)$", line)
        assert ("two_levels" in row) == bool(across)
        if across:
            assert float(across[0][0]) == pytest.approx(row["across_one_level_mb"], abs=0.051)
            assert float(across[0][1]) == pytest.approx(row["across_two_levels_mb"], abs=0.051)


def test_simulated_rows_are_means_over_windows() -> None:
    settings = Settings(TABLE, CostModel(), ring_rows=64, tokens_per_rank=2048, windows=3)
    [row] = [one for one in simulate(settings, 4) if "plan_ms" in one]
    windows = [draw_window(TABLE, tokens=8192, longest=2048, seed=seed) for seed in range(3)]
    placements = [place("document", one, context_parallel_size=4, window_length=8192) for one in windows]
    assert row["balance"] == pytest.approx(np.mean([balance(one) for one in placements]))
    shares = [received_rows(one).max() / (3 * 2048) for one in placements]
    assert row["received"] == pytest.approx(np.mean(shares)) and row["worst_received"] == max(shares)


def test_one_rank_has_nothing_but_attention() -> None:
    costs = CostModel()
    cu_seqlens = np.array([0, 300, 1000, 4096])
    placement = place("document", cu_seqlens, context_parallel_size=1, window_length=4096)
    alone = seconds_of_one_rank(np.diff(cu_seqlens), costs)
    for exchange in EXCHANGES:
        prediction = predict(exchange, placement, costs, ring_rows=100)
        assert prediction is not None
        assert prediction.total[:, 0] == pytest.approx(alone) and not prediction.received.any()
    everywhere = predict_every_document_everywhere(np.array([4096]), 1, costs)
    assert everywhere.total[:, 0] == pytest.approx(seconds_of_one_rank(np.array([4096]), costs))


def test_ulysses_needs_heads_for_every_rank() -> None:
    placement = place("document", np.array([0, 96]), context_parallel_size=3, window_length=96)
    assert predict("ulysses", placement, CostModel(shape=SHAPE), ring_rows=100) is None


def test_chunks_are_dealt_out_evenly() -> None:
    cu_seqlens = draw_window(TABLE, tokens=65536, longest=16384, seed=1)
    placement = place_chunks(cu_seqlens, 8, 512)
    held = np.bincount(placement.rank, weights=placement.stop - placement.start)
    assert held.tolist() == [8192] * 8
    owner = np.repeat(placement.rank, placement.stop - placement.start).reshape(-1, 512)
    assert (owner == owner[:, :1]).all(), "a chunk has more than one rank"


def test_padding_everywhere_costs_more_the_more_ranks_there_are() -> None:
    lengths = np.full(64, 300)
    totals = [
        predict_every_document_everywhere(lengths, ranks, CostModel()).total.sum(axis=0).max() * ranks
        for ranks in (2, 8, 32)
    ]
    assert totals == sorted(totals)
    received = predict_every_document_everywhere(np.array([1, 1]), 4, CostModel()).received
    assert received.tolist() == [3 * 4.0] * 4  # 8 tokens each once padded, 4 a rank, from three ranks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--simulate", "--repeats", "3"], "--repeats: is an option of --measure alone"),
        (["--simulate", "--heads", "8/2", "8/8"], "--heads: got 2 shapes, expected one"),
        (["--simulate", "--heads", "8/3"], "--heads: got '8/3', expected query/key-value heads"),
        (["--simulate", "--lengths", "nothing.csv"], "nothing.csv: expected a file of document lengths"),
        (
            ["--simulate", "--cp", "12", "--ranks-per-node", "8"],
            "got 12, expected a multiple of ranks_per_node = 8",
        ),
        (["--measure", "--windows", "3"], "--windows: is an option of --simulate alone"),
        (["--measure"], "--measure: run it under torchrun"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specification = importlib.util.spec_from_file_location("profile_cp", ROOT / "tools" / "profile_cp.py")
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["profile_cp.py", *words])
    assert tool.main() == 2
    assert message in capsys.readouterr().err


def test_lengths_from_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("100\n\n700\n")
    cu_seqlens = draw_window(path, tokens=5000, longest=500, seed=3)
    assert cu_seqlens[-1] == 5000 and set(np.diff(cu_seqlens)[:-1]) == {100, 500}
    path.write_text("100\nmany\n")
    with pytest.raises(ValueError, match="lengths.txt, line 2: got 'many'"):
        draw_window(path, tokens=5000, longest=500, seed=3)
    with pytest.raises(ValueError, match="none there"):
        draw_window(tmp_path / "no", tokens=5000, longest=500, seed=3)


def lopsided_steps(rank: int, world_size: int) -> np.ndarray:
    """Rank 1 is long over the first step, and rank 0 needs it in the second."""
    steps = [lambda: time.sleep(0.2 * rank), lambda: dist.barrier()]
    return slowest(timed(steps, device=torch.device("cpu"), repeats=2))


def test_a_wait_for_another_rank_is_counted_once() -> None:
    first, second = run_ranks(2, lopsided_steps)[0]
    assert first >= 200 and second < 100


def measured_rows(rank: int, world_size: int, table: Path) -> tuple[list[dict], Machine]:
    settings = Sweep(
        lengths=table, workloads=["file"], shapes=[SHAPE], sizes=[1, 2], placements=list(PLACEMENTS),
        exchanges=list(EXCHANGES), tokens_per_rank=256, total_tokens=None, parts=4, repeats=2,
        device=torch.device("cpu"), before=Machine(), ranks_per_node=None, ring_rows=64,
    )  # fmt: skip
    rows, samples = sweep(settings, lambda rows: None)
    return rows, add_predictions(rows, samples, settings)


def test_measuring_takes_layers_apart(tmp_path: Path) -> None:
    (rows, machine), (other_rows, other_machine) = run_ranks(2, measured_rows, TABLE)
    assert rows == other_rows and machine == other_machine
    seen = [(row["ranks"], row["placement"], row["tokens"]) for row in rows]
    assert sorted(seen) == sorted(
        [(1, "document", n) for n in (256, 512)] + [(2, kind, 512) for kind in ("document", *3 * PLACEMENTS)]
    )
    # a rank's queries, keys, values and outputs of 256 rows, half the heads of each
    [heads] = [row for row in rows if row["exchange"] == "ulysses"]
    values = 256 * SHAPE.head_dim * (2 * SHAPE.heads + 2 * SHAPE.groups) // 2
    assert heads["megabytes"] == pytest.approx(values * SHAPE.bytes_per_value / 1e6)
    for row in rows:
        assert row["attention_ms"] > 0 and row["exchange_ms"] > 0
        assert 0 < row["predicted_ms"] < row["fitted_ms"], "the rates known before are an H200's"
        assert 0 <= row["hidden_ms"] <= row["exchange_ms"]
        assert (row["megabytes"] > 0) == (row["ranks"] > 1)
    path = tmp_path / "measured.json"
    shape = dict(heads=4, groups=2, head_dim=16)
    results = {
        "kind": "measure", "rows": rows, "device": "CPU", "date": "today", "lengths": "x", "parts": 4,
        "shape": shape, "tokens_per_rank": 256, "windows": 1, "ranks_per_node": None,
        "machine": machine.__dict__,
    }  # fmt: skip
    path.write_text(json.dumps(results))
    assert read_machine(path) == machine
    write_report(tmp_path / "measured.html", results)
    assert Report((tmp_path / "measured.html").read_text()).tags.count("img") == 1
