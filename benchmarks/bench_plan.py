"""Placement `document` on real document lengths: how level, how much to receive, how long to plan.

python benchmarks/bench_plan.py                         # every size: about two minutes on one core
python benchmarks/bench_plan.py --ranks 8 --windows 5
python benchmarks/bench_plan.py --ranks 8 --tokens 131072 --json plan.json

A window has 16,384 tokens a rank, its documents are drawn from `document_lengths.csv` and cut at a quarter
of it. `balance` is the largest rank's attention area over the mean; `received` the worst rank's received
key/value rows as a share of those of a ring over all ranks; `bound` what no placement of balance 1.02 can
receive less than (`layout/bounds.py`); `cuts` pieces more than documents. Times are the planning
process's, of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from anchor_megatron.layout.bounds import least_received_rows, least_unevenness
from anchor_megatron.layout.placement import balance, place, received_rows
from anchor_megatron.layout.plan import make_plan
from anchor_megatron.testing.lengths import draw_lengths

TABLE = Path(__file__).with_name("document_lengths.csv")
TARGETS = {  # ranks: balance, received, milliseconds
    2: (1.01, 0.08, None),
    4: (1.01, 0.20, None),
    8: (1.02, 0.15, 5),
    16: (1.02, 0.18, None),
    32: (1.02, 0.17, None),
    64: (1.02, 0.15, 60),
    256: (1.03, 0.045, None),
    1024: (1.03, 0.02, 2000),
}
HEADER = "ranks  balance mean (worst) target | received (worst) target  bound  gap | cuts | place ms  plan ms"


@dataclass(frozen=True)
class Row:
    """One size: means over its windows, and the worst."""

    ranks: int
    windows: int
    documents: float
    balance: float
    worst_balance: float
    least_balance: float
    received: float
    worst_received: float
    bound: float
    cuts: float
    place_ms: float
    plan_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(TARGETS), help="context-parallel sizes")
    parser.add_argument("--windows", type=int, default=20, help="windows of each size (%(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens a window (16,384 a rank)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    print(HEADER)
    rows = []
    for ranks in given.ranks:
        rows.append(measure(ranks, given.windows, given.tokens or 16384 * ranks))
        print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(ranks: int, windows: int, tokens: int) -> Row:
    """Places and plans that many windows; each rank's plan is as quick as any other's, so one is timed."""
    found = np.array([_window(ranks, tokens, seed) for seed in range(windows)])
    mean, worst = found.mean(axis=0), found.max(axis=0)
    return Row(
        ranks,
        windows,
        mean[0],
        mean[1],
        worst[1],
        mean[2],
        mean[3],
        worst[3],
        mean[4],
        mean[5],
        mean[6],
        mean[7],
    )


def _window(ranks: int, tokens: int, seed: int) -> tuple[float, ...]:
    lengths = draw_lengths(TABLE, tokens=tokens, longest=tokens // 4, seed=seed)
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int64)
    started = time.process_time()
    placement = place("document", cu_seqlens, context_parallel_size=ranks, window_length=tokens)
    placed = time.process_time()
    make_plan(placement, ranks - 1)
    planned = time.process_time()
    ring = max(1, tokens - tokens // ranks)
    return (
        lengths.size,
        balance(placement),
        least_unevenness(cu_seqlens, ranks),
        int(received_rows(placement).max()) / ring,
        least_received_rows(cu_seqlens, ranks, unevenness=1.02) / ring,
        placement.rank.size - lengths.size,
        (placed - started) * 1e3,
        (planned - placed) * 1e3,
    )


def line(row: Row) -> str:
    """A row of the table."""
    level, share, limit = TARGETS.get(row.ranks, (float("nan"), float("nan"), None))
    gap = f"{row.received / row.bound - 1:4.0%}" if row.bound else "   -"
    within = f" of {limit}" if limit else ""
    return (
        f"{row.ranks:5}  {row.balance:12.4f} ({row.worst_balance:.4f})  {level:5.2f} | "
        f"{row.received:8.4f} ({row.worst_received:.4f})  {share:5.3f}  {row.bound:.4f} {gap} | "
        f"{row.cuts:4.0f} | {row.place_ms:8.1f}  {row.plan_ms:7.2f}{within}"
    )


if __name__ == "__main__":
    main()
