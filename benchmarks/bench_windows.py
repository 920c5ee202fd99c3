"""Measures windows: how fast they are packed and planned, and what each way of packing gives up.

    python benchmarks/bench_windows.py [--tokens 60000000] [--json FILE]

Documents are of lengths drawn from document_lengths.csv, windows of 131,072 tokens. Speed: tokens a second of
the loader of one rank (packing, labels, placement, plan, arrays) with 2 workers and context parallelism 8,
against what an 8B model on 8 H200s consumes at half of their peak: with tensor or context parallelism 8 all
of it goes through the loader of every rank. Packing: documents that are cut, and how evenly the windows of a
global batch are loaded (the largest one's attention area over the mean one's), by the batches that are looked
ahead over. Prints tables and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import make_set
from torch.utils.data import DataLoader, Dataset

from anchor_megatron.config import model_config
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import Packing, WindowDataset
from anchor_megatron.testing.lengths import draw_lengths
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.flops import step_flops

ROOT = Path(__file__).parents[1]
SEQ_LENGTH = 131_072
LONGEST = 200_000
CONTEXT_PARALLEL = 8
GPUS, PEAK_FLOPS, UTILISATION = 8, 989e12, 0.5  # H200, dense bf16
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
        speeds = {name: measure_speed(documents, packing) for name, packing in SPEEDS.items()}
        packings = [
            measure_packing(documents, Packing(kind, lookahead, batch))
            for batch in (8, 32)
            for kind, lookahead in (("plain", 1), ("best_fit", 8), ("balanced", 2), ("balanced", 8))
        ]
    print(f"an 8B model on {GPUS} H200s at {UTILISATION:.0%} of their peak consumes {consumed:,.0f} tokens/s")
    for name, speed in speeds.items():
        print(f"    {name:20} {speed:14,.0f} tokens/s   {speed / consumed:6.1f} x")
    print("batch  packing   ahead   balance  worst   cut pieces   padding")
    for row in packings:
        print(
            f"{row['batch_windows']:5}  {row['kind']:8}  {row['lookahead']:5}   {row['balance']:7.2f}  "
            f"{row['worst']:5.2f}   {row['cut']:10.2%}   {row['padding']:7.2%}"
        )
    figures = dict(consumed=consumed, tokens_per_second=speeds, packing=packings)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if min(speeds.values()) > 10 * consumed else 1


def consumption(documents: Documents) -> float:
    """Tokens a second of Llama-3-8B, by its FLOPs for windows of these documents."""
    windows = WindowDataset(documents, seq_length=SEQ_LENGTH, anchor_token=0, seed=0)
    areas = [attention_area(windows[n].cu_seqlens) for n in range(64)]
    model = model_config({"preset": "llama-3-8b"})
    flops = step_flops(model, tokens=SEQ_LENGTH, area=int(np.mean(areas))) / SEQ_LENGTH
    return GPUS * PEAK_FLOPS * UTILISATION / flops


def attention_area(cu_seqlens: np.ndarray) -> int:
    lengths = np.diff(cu_seqlens)
    return int((lengths * (lengths + 1) // 2).sum())


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
    """Tokens a second from 2 workers over an epoch, their start left out."""
    windows = WindowDataset(documents, seq_length=SEQ_LENGTH, anchor_token=0, seed=0, packing=packing)
    count = windows.windows_per_epoch(0)
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
    found = [windows[n] for n in range(steps * packing.batch_windows)]
    areas = np.array([attention_area(window.cu_seqlens) for window in found]).reshape(steps, -1)
    balance = areas.max(axis=1) / areas.mean(axis=1)
    pieces = sum(window.counts.pieces for window in found)
    return {
        **{name: dataclasses.asdict(packing)[name] for name in ("kind", "lookahead", "batch_windows")},
        "balance": float(balance.mean()),
        "worst": float(balance.max()),
        "cut": sum(window.counts.cut for window in found) / pieces,
        "padding": sum(window.counts.padding for window in found) / areas.size / SEQ_LENGTH,
    }


if __name__ == "__main__":
    sys.exit(main())
