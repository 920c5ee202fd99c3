"""Does training wait for the planner? A loop of idle steps takes batches that loader workers pack and plan.

    python benchmarks/bench_wait.py                            # 8 and 64 ranks of 16,384 tokens, 200 ms steps
    python benchmarks/bench_wait.py --ranks 1024 --step-ms 2000

A worker makes what one rank needs of a window: placement, its plan, its tokens. `wait` is how long the loop
stood still for a batch, the taking over from the worker included, the first ones (workers starting) left out.
A real step of that many tokens takes longer than these.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from anchor_megatron.data.window import Window
from anchor_megatron.testing.lengths import draw_lengths
from anchor_megatron.testing.models import random_window
from anchor_megatron.training.batch import PlannedBatch, plan_batch

TABLE = Path(__file__).with_name("document_lengths.csv")


class Planned(Dataset):
    """What a rank's workers make of a few windows, again and again."""

    def __init__(self, windows: list[Window], ranks: int, batches: int) -> None:
        self.windows, self.ranks, self.batches = windows, ranks, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, item: int) -> PlannedBatch:
        return plan_batch(
            [self.windows[item % len(self.windows)]],
            mode="anchor",
            placement="document",
            context_parallel_size=self.ranks,
            context_parallel_rank=item % self.ranks,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="context-parallel sizes")
    parser.add_argument("--step-ms", type=float, default=200.0, help="milliseconds of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2, help="data.num_workers (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    rows = [measure(ranks, given.steps, given.workers, given.step_ms / 1e3) for ranks in given.ranks]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(ranks: int, steps: int, workers: int, step: float) -> dict[str, float]:
    """Runs the loop and prints its row."""
    windows = [_window(16384 * ranks, seed) for seed in range(4)]
    begun = time.perf_counter()
    for item in range(4):
        Planned(windows, ranks, 4)[item]
    alone = (time.perf_counter() - begun) / 4 * 1e3
    first = 2 * workers
    batches = iter(DataLoader(Planned(windows, ranks, first + steps), batch_size=None, num_workers=workers,
                              prefetch_factor=4))  # fmt: skip
    for _ in range(first):
        next(batches)
    waits = []
    for _ in range(steps):
        time.sleep(step)
        begun = time.perf_counter()
        next(batches)
        waits.append((time.perf_counter() - begun) * 1e3)
    row = {
        "ranks": ranks,
        "batch_ms": alone,
        "step_ms": step * 1e3,
        "workers": workers,
        "wait_ms": float(np.mean(waits)),
        "median_wait_ms": float(np.median(waits)),
        "longest_wait_ms": max(waits),
    }
    print(
        f"{ranks:5} ranks: a batch takes {alone:.1f} ms, a step {step * 1e3:.0f}; "
        f"wait {row['wait_ms']:.2f} ms, median {row['median_wait_ms']:.2f}, longest {max(waits):.2f}",
        flush=True,
    )
    return row


def _window(tokens: int, seed: int) -> Window:
    lengths = draw_lengths(TABLE, tokens=tokens, longest=tokens // 4, seed=seed)
    return random_window(lengths=lengths.tolist(), vocab_size=128256, seed=seed)


if __name__ == "__main__":
    main()
