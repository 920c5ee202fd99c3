"""Milliseconds of steps that follow one another, on a GPU by device events, elsewhere by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["Figures", "timed"]

# milliseconds [repeats, steps] of every rank, in rank order
Figures = np.ndarray

_HEAD_START = 20_000_000  # clock cycles, some 10 ms


def timed(
    steps: list[Callable[[], None]], *, device: torch.device, repeats: int, warm_up: int = 2
) -> Figures:
    """Float64 [ranks, repeats, steps]; all ranks begin each repeat together and get the same figures."""
    mine = []
    for repeat in range(warm_up + repeats):
        marks = _cuda(steps) if device.type == "cuda" else _clock(steps)
        if repeat >= warm_up:
            mine.append(marks)
    everyone: list[list[list[float]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return np.array(everyone)


def _cuda(steps: list[Callable[[], None]]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    dist.barrier()
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)  # in training, too, the host is ahead of the device
    marks[0].record()
    for step, mark in zip(steps, marks[1:], strict=True):
        step()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]


def _clock(steps: list[Callable[[], None]]) -> list[float]:
    dist.barrier()
    marks = [time.perf_counter()]
    for step in steps:
        step()
        marks.append(time.perf_counter())
    return (np.diff(marks) * 1e3).tolist()
