"""`tools/compare_logits.py`: every exchange agrees with one rank, and a plan that is wrong is found out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from anchor_megatron.layout.exchanges import EXCHANGES
from anchor_megatron.layout.plan import Plan
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training import batch

TOOL = Path(__file__).parents[1] / "tools" / "compare_logits.py"


def on_rank(rank: int, world_size: int, words: list[str], broken: bool) -> tuple[int, str]:
    """Exit status and what was printed; broken: the last rank sees its keys in another order."""
    found = importlib.util.spec_from_file_location("compare_logits", TOOL)
    assert found is not None and found.loader is not None
    tool = importlib.util.module_from_spec(found)
    found.loader.exec_module(tool)
    whole = batch.plan_exchange

    def swapped(*args: Any, **options: Any) -> Plan:
        plan = whole(*args, **options)
        return dataclasses.replace(plan, key_index=plan.key_index[::-1].copy())

    if broken and rank == world_size - 1:
        batch.plan_exchange = swapped
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            return tool.main(words), printed.getvalue()
    finally:
        batch.plan_exchange = whole


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 0.02)])
def test_every_exchange_says_what_one_rank_says(precision: str, bound: float, tmp_path: Path) -> None:
    words = ["--tokens", "256", "--precision", precision, "--ring-rows", "10"]
    words += ["--output", str(tmp_path / "out"), "--bound", str(bound)]
    (status, printed), *_ = run_ranks(4, on_rank, words, False)
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    exchanges = [(n, exchange) for n in (2, 4) for exchange in EXCHANGES]
    assert status == 0 and [(row["ranks"], row["exchange"]) for row in rows] == [(1, "none"), *exchanges]
    assert all(row["identical"] for row in rows if row["exchange"] == "ulysses"), printed
    assert all(0 < row["from_fp64"] <= 2 * bound for row in rows), printed


def test_a_broken_plan_is_found_out() -> None:
    words = ["--tokens", "256", "--placement", "zigzag", "--mode", "full", "--exchanges", "sparse"]
    assert [status for status, _ in run_ranks(2, on_rank, words, False)] == [0, 0]
    assert [status for status, _ in run_ranks(2, on_rank, words, True)] == [1, 1]


def test_what_cannot_be_compared_ends_in_one_message(tmp_path: Path) -> None:
    ((status, printed),) = run_ranks(1, on_rank, ["--checkpoint", str(tmp_path)], False)
    assert status == 2 and printed.startswith("compare_logits.py: ") and printed.count("\n") == 1
