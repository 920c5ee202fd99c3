"""Measures windows: how fast they are packed and planned, and what each way of packing gives up.

    python benchmarks/bench_windows.py [--tokens 60000000] [--json FILE]

Documents are of lengths drawn from document_lengths.csv, windows of 131,072 tokens. Speed: tokens a second of
the loader of one rank (packing, labels, placement, plan, arrays) with 2 workers and context parallelism 8,
the kinds in turn, medians of the rounds. Beside it what an 8B model on 8 H200s consumes: eight times the
operations a second that results/step_1gpu.json has measured for four of its layers, over the operations of a
token. With tensor or context parallelism 8 all of that goes through the loader of every rank. Packing: pieces
of documents that are cut, and how evenly the windows of a global batch are loaded (the largest attention area
over the mean), by the batches that are looked ahead over. Prints tables and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_data import make_set
from torch.utils.data import DataLoader, Dataset

from anchor_megatron.config import model_config
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import Packing, WindowDataset
from anchor_megatron.testing.lengths import draw_lengths, workload_lengths
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.flops import step_flops
from anchor_megatron.training.packing_report import packing_report

ROOT = Path(__file__).parents[1]
SEQ_LENGTH = 131_072
LONGEST = 200_000
CONTEXT_PARALLEL = 8
GPUS = 8
ROUNDS, TIMED_WINDOWS = 3, 200
SPEEDS = {
    "plain": Packing(),
    "best_fit": Packing("best_fit", batch_windows=8),
    "balanced": Packing("balanced", batch_windows=8),
    "plain, interleaved": Packing(interleave=1024),
}


def main() -> int:
    """0 where every kind of window comes at 10 times the rate at which it is consumed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=60_000_000, help="of the documents (%(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "windows.json")
    given = parser.parse_args()
    table = ROOT / "benchmarks" / "document_lengths.csv"
    lengths = draw_lengths(table, tokens=given.tokens, longest=LONGEST, seed=0)
    with tempfile.TemporaryDirectory(prefix="bench-windows-") as folder:
        documents = make_set(Path(folder) / "set", lengths)
        consumed = consumption(documents)
        rounds = [
            {name: measure_speed(documents, packing) for name, packing in SPEEDS.items()}
            for _ in range(ROUNDS)
        ]
        speeds = {name: statistics.median(one[name] for one in rounds) for name in SPEEDS}
        packings = [
            measure_packing(documents, Packing(kind, lookahead, batch))
            for batch in (8, 32)
            for kind, lookahead in (("plain", 1), ("best_fit", 8), ("balanced", 2), ("balanced", 8))
        ]
    print(f"an 8B model on {GPUS} H200s consumes {consumed:,.0f} tokens/s")
    for name, speed in speeds.items():
        print(f"    {name:20} {speed:14,.0f} tokens/s   {speed / consumed:6.1f} x")
    print("batch  packing   ahead   balance  worst   cut pieces   padding")
    for row in packings:
        print(
            f"{row['batch_windows']:5}  {row['kind']:8}  {row['lookahead']:5}   {row['balance']:7.2f}  "
            f"{row['worst']:5.2f}   {row['cut']:10.2%}   {row['padding']:7.2%}"
        )
    figures = dict(consumed=consumed, tokens_per_second=speeds, rounds=rounds, packing=packings)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if min(speeds.values()) > 10 * consumed else 1


def consumption(documents: Documents) -> float:
    """Tokens a second of Llama-3-8B, by its FLOPs for windows of these documents."""
    windows = WindowDataset(documents, seq_length=SEQ_LENGTH, anchor_token=0, seed=0)
    report = packing_report(windows, range(64), mode="anchor", batch_windows=1)
    model = model_config({"preset": "llama-3-8b"})
    flops = step_flops(model, tokens=SEQ_LENGTH, area=int(report.area.mean())) / SEQ_LENGTH
    return GPUS * measured_rate() / flops


def measured_rate() -> float:
    """Operations a second of one H200 in the pass that step_1gpu.json has measured."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "step_1gpu.json").read_text())
    [row] = [row for row in kept["rows"] if row["name"] == "ours, anchor"]
    model = model_config({"preset": kept["preset"], "num_layers": kept["layers"]})
    lengths = workload_lengths("file", kept["tokens"], table=ROOT / "benchmarks" / "document_lengths.csv")
    area = int((lengths * (lengths + 1) // 2).sum())
    return step_flops(model, tokens=kept["tokens"], area=area) / row["ms"] * 1000


class Batches(Dataset):
    """What a rank's loader makes of each window."""

    def __init__(self, windows: WindowDataset, count: int) -> None:
        self.windows, self.count = windows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> PlannedBatch:
        return plan_batch(
            [self.windows[n]],
            mode="anchor",
            placement="document",
            context_parallel_size=CONTEXT_PARALLEL,
            context_parallel_rank=0,
        )


def measure_speed(documents: Documents, packing: Packing) -> float:
    """Tokens a second from 2 workers, their start left out."""
    windows = WindowDataset(documents, seq_length=SEQ_LENGTH, anchor_token=0, seed=0, packing=packing)
    count = min(16 + TIMED_WINDOWS, windows.windows_per_epoch(0))
    loader = iter(DataLoader(Batches(windows, count), batch_size=None, num_workers=2, prefetch_factor=4))
    for _ in range(16):
        next(loader)
    started = time.perf_counter()
    rest = sum(1 for _ in loader)
    return rest * SEQ_LENGTH / (time.perf_counter() - started)


def measure_packing(documents: Documents, packing: Packing) -> dict[str, Any]:
    """Shares of pieces whose document goes on elsewhere and of padding; areas in global batches."""
    windows = WindowDataset(documents, seq_length=SEQ_LENGTH, anchor_token=0, seed=0, packing=packing)
    steps = windows.windows_per_epoch(0) // packing.batch_windows
    numbers, batch = range(steps * packing.batch_windows), packing.batch_windows
    found = packing_report(windows, numbers, mode="anchor", batch_windows=batch)
    balance = found.balance()
    return {
        **{name: dataclasses.asdict(packing)[name] for name in ("kind", "lookahead", "batch_windows")},
        "balance": float(balance.mean()),
        "worst": float(balance.max()),
        "cut": float(found.cut.sum() / found.pieces.sum()),
        "padding": float(found.padding.mean() / SEQ_LENGTH),
    }


if __name__ == "__main__":
    sys.exit(main())
