"""A long run in one process: what it holds of memory and files must stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
from faults import scenes
from faults.parts import Part

from anchor_megatron.config import Config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.loop import Run

MOST = 2000.0  # bytes that a step may add


def many_steps(rank: int, world_size: int, config: Config, every: int) -> list[tuple[int, int]]:
    """Resident bytes and open files of the process after every so many steps."""
    process, seen = psutil.Process(), []
    with scenes.quiet():
        run = Run(config)
        judge = run.health.judge

        def watch(step: int, **given: bool) -> None:
            judge(step, **given)
            if step % every == 0:
                seen.append((process.memory_info().rss, process.num_fds()))

        run.health.judge = watch  # type: ignore[method-assign]
        run.train()
    return seen


def steps(number: int, data: Path, folder: Path) -> Part:
    """Memory and descriptors of a run of many steps that saves on the way, its first half left out."""
    given = dict(
        parallel=dict(context=1), train=dict(steps=number), data=dict(seq_length=64), log=dict(interval=10)
    )
    config = scenes.configuration(
        data, folder / "steps", checkpoint=dict(save_interval=max(1, number // 100)), **given
    )
    every = max(1, number // 100)
    seen = run_ranks(1, many_steps, config, every, timeout=3600.0)[0]
    memory, files = np.array(seen[len(seen) // 2 :]).T
    slope = np.polyfit(np.arange(memory.size) * every, memory, 1)[0]
    grown = f"{memory[0] / 1e6:.1f} to {memory[-1] / 1e6:.1f} MB ({slope / 1e3:+.2f} KB a step)"
    part = Part()
    part.add(
        f"{number} steps and 100 checkpoints, the second half",
        f"resident memory {grown}, file descriptors {files[0]} to {files[-1]}",
        ok=slope < MOST and files[-1] <= files[0],
        bytes_per_step=round(float(slope), 1), megabytes=(memory[[0, -1]] / 1e6).round(1).tolist(),
        descriptors=[int(files[0]), int(files[-1])],
    )  # fmt: skip
    return part
