"""Measures planning: documents' borders to one rank's plan, what a loader's worker does for a micro-batch.

    python benchmarks/bench_plan.py [--tokens 131072] [--documents 100] [--ranks 8] [--output FILE]

`place` and `make_plan` of one rank, windows of `--tokens` tokens and `--documents` documents; medians over
`--windows` of them, each planned for the next rank in turn. Lengths are log-normal, as those of web text
about are, scaled to fill the window; "one" is a single document over the window.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import anchor_megatron
from anchor_megatron.layout.placement import PLACEMENTS, balance, place
from anchor_megatron.layout.plan import make_plan

ROOT = Path(__file__).parents[1]
TARGET_SECONDS = 0.005  # one window of 131,072 tokens and 100 documents for 8 ranks, placement `document`


def main() -> int:
    """0 where planning by documents is as fast as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=131_072, help="of the window (%(default)s)")
    parser.add_argument("--documents", type=int, default=100, help="in the window (%(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="context-parallel size (%(default)s)")
    parser.add_argument("--windows", type=int, default=20, help="drawn, each timed (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "plan.json")
    given = parser.parse_args()
    borders = {
        f"{given.documents} documents": [draw(given, seed) for seed in range(given.windows)],
        "one": [np.array([0, given.tokens])] * given.windows,
    }
    rows: list[dict[str, Any]] = [
        {"documents": name, "placement": placement, **measure(windows, placement, given.ranks)}
        for name, windows in borders.items()
        for placement in PLACEMENTS
    ]
    figures = {"tokens": given.tokens, "ranks": given.ranks, **versions(), "rows": rows}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(figures, indent=2) + "\n")
    print_table(rows)
    return 0 if rows[0]["seconds"] < TARGET_SECONDS else 1


def draw(given: argparse.Namespace, seed: int) -> np.ndarray:
    """Borders int64 [documents + 1] of documents that fill the window."""
    lengths = np.random.default_rng(seed).lognormal(0.0, 1.2, given.documents)
    inner = np.cumsum(lengths)[:-1] / lengths.sum() * (given.tokens - given.documents)
    return np.concatenate([[0], inner.astype(np.int64) + np.arange(1, given.documents), [given.tokens]])


def measure(windows: list[np.ndarray], placement: str, ranks: int) -> dict[str, float]:
    """Medians over the windows, and the worst: seconds, balance, tokens that the planned rank receives."""
    placing, planning, balances, received = [], [], [], []
    for number, cu_seqlens in enumerate(windows):
        started = time.perf_counter()
        placed = place(placement, cu_seqlens, context_parallel_size=ranks, window_length=int(cu_seqlens[-1]))
        between = time.perf_counter()
        plan = make_plan(placed, number % ranks)
        planning.append(time.perf_counter() - between)
        placing.append(between - started)
        balances.append(balance(placed))
        received.append(sum(plan.recv_counts))
    both = [sum(pair) for pair in zip(placing, planning, strict=True)]
    return {
        "seconds": statistics.median(both),
        "worst_seconds": max(both),
        "placing_seconds": statistics.median(placing),
        "planning_seconds": statistics.median(planning),
        "balance": statistics.median(balances),
        "worst_balance": max(balances),
        "received_tokens": statistics.median(received),
    }


def versions() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "date": datetime.date.today().isoformat(),
        "anchor_megatron": anchor_megatron.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],  # far above 1: the machine was not this benchmark's alone
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The figures for reading."""
    print("| documents | placement | ms | worst ms | placing ms | one plan ms | balance | worst | received |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        seconds = ("seconds", "worst_seconds", "placing_seconds", "planning_seconds")
        times = " | ".join(f"{row[name] * 1e3:.2f}" for name in seconds)
        print(
            f"| {row['documents']} | {row['placement']} | {times} | {row['balance']:.3f} "
            f"| {row['worst_balance']:.3f} | {row['received_tokens']:,.0f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
