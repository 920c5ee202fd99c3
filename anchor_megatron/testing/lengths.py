"""Document lengths for benches: drawn from a table of how long real documents are, or made up.

The table (`benchmarks/document_lengths.csv`) counts documents by ranges of tokens; inside a range lengths are
drawn log-uniformly.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

__all__ = ["WORKLOADS", "draw_lengths", "workload_lengths"]

WORKLOADS = ("file", "uniform", "one", "short")


def workload_lengths(workload: str, tokens: int, *, table: Path, seed: int = 0) -> np.ndarray:
    """Lengths int64, summing to `tokens`, of one of WORKLOADS.

    file: drawn from `table`, cut at a quarter of the tokens; uniform: 4,096 each; one: a single document;
    short: drawn, at most 2,048.
    """
    if workload == "file":
        return draw_lengths(table, tokens=tokens, longest=tokens // 4, seed=seed)
    if workload == "short":
        return draw_lengths(table, tokens=tokens, longest=2048, seed=seed)
    if workload == "uniform":
        return np.full(tokens // 4096, 4096)
    if workload == "one":
        return np.array([tokens])
    raise ValueError(f"workload: got {workload!r}, expected one of {', '.join(WORKLOADS)}")


def draw_lengths(table: Path, *, tokens: int, longest: int, seed: int) -> np.ndarray:
    """Lengths int64 of documents that fill `tokens`, none beyond `longest`; the last is cut to fit."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    ranges = np.array([[float(bound) for bound in row["range"].strip("[]").split(",")] for row in rows])
    counts = np.array([float(row["number"]) for row in rows])
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    left = tokens
    while left:
        low, high = ranges[generator.choice(counts.size, p=counts / counts.sum())]
        drawn = np.exp(generator.uniform(np.log(max(low, 1)), np.log(high + 1)))
        lengths.append(min(int(drawn), longest, left))
        left -= lengths[-1]
    return np.asarray(lengths)
