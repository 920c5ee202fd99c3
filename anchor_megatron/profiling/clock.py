"""Milliseconds of steps that follow one another, on a GPU by device events, elsewhere by the clock.

Ranks begin every step together. Were they to run on from one step into the next, a rank that has little to
do in the first would wait for the others in the second, and that wait be counted in both:

    rank 0   forward 50 | backward 140, and waiting for rank 1's gradients 400
    rank 1   forward 160           | backward 440                        sum of the slowest: 160 + 540
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["Figures", "slowest", "timed"]

# milliseconds [ranks, repeats, steps], in rank order
Figures = np.ndarray

_HEAD_START = 20_000_000  # clock cycles, some 10 ms


def timed(
    steps: list[Callable[[], None]], *, device: torch.device, repeats: int, warm_up: int = 2
) -> Figures:
    """Float64 [ranks, repeats, steps]; all ranks begin each step together and get the same figures. Without
    process groups there is one rank.
    """
    one = _cuda if device.type == "cuda" else _clock
    mine = [[one(step) for step in steps] for _ in range(warm_up + repeats)][warm_up:]
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return np.array(everyone)


def slowest(figures: Figures) -> np.ndarray:
    """The slowest rank's milliseconds, float64 [steps]: medians over the repeats."""
    return np.median(figures.max(axis=0), axis=0)


def _cuda(step: Callable[[], None]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait_for_all()
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)  # in training, too, the host is ahead of the device
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def _clock(step: Callable[[], None]) -> float:
    _wait_for_all()
    before = time.perf_counter()
    step()
    return (time.perf_counter() - before) * 1e3


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
