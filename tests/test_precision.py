"""The precision lab: its definitions, what is exact, what the seeded cases show, and that its sentences
follow.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anchor_megatron.attention.oracle import dense_attention
from anchor_megatron.model.rotary import RotaryAngles
from anchor_megatron.precision.attention import attention_weights, compare, spread_rows
from anchor_megatron.precision.experiments import length_test, logit_test, mode_test, shift_test
from anchor_megatron.precision.findings import findings
from anchor_megatron.precision.implementations import rope_test
from anchor_megatron.precision.rope import EXACT, published_ropes, reduced_angles
from anchor_megatron.precision.vectors import random_vectors, sink_vectors

ROOT = Path(__file__).resolve().parent.parent
FREQUENCIES = torch.from_numpy(5e5 ** -(np.arange(0, 128, 2) / 128))
ROPES = {rope.name: rope for rope in published_ropes()}
RANDOM = random_vectors(512, FREQUENCIES, heads=8, groups=8)
SINK = sink_vectors(RANDOM, span=131_072)


def test_weights_are_the_oracles() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(9, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2))
    rows = spread_rows(9, 3)
    assert rows.tolist() == [2, 5, 8]
    weights = attention_weights(q[rows], k, rows, scale=0.25)
    one_hot = torch.eye(9, dtype=torch.float64)[:, None].expand(9, 2, 9)  # values that show the weights
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = dense_attention(q, k, one_hot, visible, scale=0.25).transpose(0, 1)
    torch.testing.assert_close(weights, expected[:, rows])


def test_our_angles_are_the_models() -> None:
    positions = torch.tensor([0, 1, 4095, 1 << 20])
    torch.testing.assert_close(
        reduced_angles(positions, FREQUENCIES),
        RotaryAngles(FREQUENCIES)(positions)[:, 0, 0, :64],
        atol=0,
        rtol=0,
    )


def test_compare_is_the_mean_change_of_a_query() -> None:
    one, other = torch.tensor([[[0.7, 0.2, 0.1]]]), torch.tensor([[[0.6, 0.2, 0.2]]])
    difference = compare(one, other)
    assert difference.total == pytest.approx(0.2) and difference.first_share == pytest.approx(0.5)


@pytest.mark.parametrize("vectors", [RANDOM, SINK], ids=["random", "sink"])
def test_exact_arithmetic_does_not_see_a_shift(vectors: Any) -> None:
    for row in shift_test(vectors, [EXACT], reference=16, shifts=[0, 1000, 1_000_000]):
        assert row["difference"] < 1e-9, row


@pytest.mark.parametrize("vectors", [RANDOM, SINK], ids=["random", "sink"])
def test_bf16_sees_a_shift_and_fp32_hardly(vectors: Any) -> None:
    rows = shift_test(
        vectors, [ROPES[n] for n in ("fp32", "transformers", "ours")], reference=16, shifts=[1000]
    )
    fp32, transformers, ours = (row["difference"] for row in rows)
    assert 100 * fp32 < ours < transformers


def test_ours_loses_nothing_but_one_rounding_at_any_position() -> None:
    rows = rope_test(RANDOM, published_ropes(), positions=[1 << 20, 1 << 22])
    multiple = {(row["rope"], row["position"]): row["multiple"] for row in rows}
    assert multiple["ours", 1 << 20] <= 1.001 and multiple["ours", 1 << 22] <= 1.001
    assert multiple["te", 1 << 20] > 3 and multiple["te", 1 << 22] > 10
    assert multiple["transformers", 1 << 20] == multiple["megatron", 1 << 20] > 3
    assert 1.5 < multiple["ours_unfused", 1 << 22] < 1.8


def test_the_error_of_a_score_grows_with_distance_where_angles_are_fp32_products_only() -> None:
    rows = logit_test(RANDOM, [ROPES["fp32"], ROPES["ours"]], distances=[1024, 131_072], shift=16)
    fp32_near, ours_near, fp32_far, ours_far = (row["error"] for row in rows)
    assert fp32_far > 50 * fp32_near
    assert 0.8 < ours_far / ours_near < 1.25


def test_the_first_tokens_share_needs_an_attention_sink() -> None:
    """The paper finds most of D on the first token. That holds where the first token draws attention, up to
    the half that is possible (a query's weights add up to 1), and not on random vectors.
    """
    for vectors, least, most in ((RANDOM, 0.0, 0.02), (SINK, 0.25, 0.5)):
        [row] = shift_test(vectors, [ROPES["transformers"]], reference=16, shifts=[100_000])
        assert least < row["first_share"] <= most, vectors.name


def test_modes_rank_as_the_paper_says_where_there_is_a_sink_and_are_alike_where_not() -> None:
    offsets = [1_000, 10_000, 131_072]
    found = {}
    for vectors in (RANDOM, SINK):
        rows = mode_test(vectors, [ROPES["ours"]], offsets=offsets)
        for mode in ("document_reset", "anchor", "document"):
            mine = [row for row in rows if row["mode"] == mode]
            found[vectors.name, mode] = np.mean([row["error"] for row in mine])
            found[vectors.name, mode, "first"] = np.mean([row["error_first_share"] for row in mine])
    assert found["sink", "document_reset"] < found["sink", "anchor"] < 0.9 * found["sink", "document"]
    assert found["sink", "anchor", "first"] < found["sink", "document", "first"]
    assert found["random", "anchor"] == pytest.approx(found["random", "document"], rel=0.05)


def test_positions_that_restart_do_not_move_and_running_ones_move_by_rounding_alone() -> None:
    rows = mode_test(SINK, [ROPES["ours"]], offsets=[100_000])
    by = {row["mode"]: row for row in rows}
    assert by["document_reset"]["moved"] == 0
    assert by["document"]["moved_exact"] < 1e-9 < by["document"]["moved"]
    assert by["anchor"]["moved_exact"] > 1e-2  # an anchor further away is another input


def test_length_is_looked_at_from_the_end() -> None:
    rows = length_test(RANDOM, [ROPES["ours"]], reference=0, shift=1000, lengths=[64, 512], rows=4)
    assert [row["length"] for row in rows] == [64, 512]
    assert rows[0]["first_attention"] == pytest.approx(1 / 64, rel=1)
    assert rows[1]["first_attention"] == pytest.approx(1 / 512, rel=1)


def run_tool(*words: str) -> int:
    """The tool's exit status, in this process."""
    description = importlib.util.spec_from_file_location("rope_precision", ROOT / "tools/rope_precision.py")
    assert description is not None and description.loader is not None
    tool = importlib.util.module_from_spec(description)
    description.loader.exec_module(tool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rope_precision.py", *words])
        return tool.main()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool's output folder for a random model, with less of everything than by default."""
    folder = tmp_path_factory.mktemp("precision")
    assert run_tool("--tokens", "64", "--layers", "2", "--length", "2048", "--out", str(folder)) == 0
    return folder


def test_the_report_is_whole(report: Path) -> None:
    results = json.loads((report / "precision.json").read_text())
    page = (report / "report.html").read_text()
    assert page.count("<img ") == len(list(report.glob("*.png"))) == 6
    assert all(finding["text"] for finding in results["findings"])
    assert {row["layer"] for row in results["layers"]} == {0, 1}


def test_sentences_follow_the_numbers(report: Path) -> None:
    """Numbers turned round turn every verdict on the paper round."""
    results = json.loads((report / "precision.json").read_text())
    before = {(one.claim, one.text): one.verdict for one in findings(results)}
    assert set(before.values()) == {"", "supports", "does not support"}
    turned = copy.deepcopy(results)
    for row in turned["shift"] + turned["layers"]:
        row["difference"] = {"fp32": 1.0}.get(row["rope"], 0.5)
    broken = [one for one in findings(turned) if one.claim.startswith("BF16 breaks")]
    assert broken and all(one.verdict == "does not support" for one in broken)
    assert all("0.5 times as much" in one.text for one in broken)
    for row in turned["modes"]:
        row["error"] = 0.1 if row["mode"] == "anchor" else 1.0
    eased = [one for one in findings(turned) if one.claim.startswith("An anchor")]
    assert eased and all(one.verdict == "supports" and "0.1 times" in one.text for one in eased)


def test_a_report_is_written_again_from_its_results(report: Path, tmp_path: Path) -> None:
    assert run_tool("--results", str(report / "precision.json"), "--out", str(tmp_path)) == 0
    for name in ("report.html", "precision.json"):
        assert (tmp_path / name).read_text() == (report / name).read_text()


def test_wrong_input_ends_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--hf", str(tmp_path)],
        ["--preset", "gpt-9"],
        ["--length", "5"],
        ["--results", "none.json"],
    ):
        assert run_tool(*words, "--out", str(tmp_path)) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("rope_precision.py: ") and errors.count("\n") == 1
