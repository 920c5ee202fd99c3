"""Timing on a GPU: device events, warm-up, the median; and results as JSON with where and when."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["environment", "forward_backward_ms", "write_results"]


def forward_backward_ms(
    forward: Callable[[], Tensor], leaves: list[Tensor], *, repeats: int = 10, warm_up: int = 3
) -> tuple[float, float]:
    """Median milliseconds of `forward()` and of its backward pass; of several ranks the slowest counts.

    All ranks begin each repeat together; the output's gradient is random (zeros run faster than real data).
    """
    dout = torch.randn_like(forward())
    times: list[tuple[float, float]] = []
    for repeat in range(warm_up + repeats):
        for leaf in leaves:
            leaf.grad = None
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.synchronize()
        marks[0].record()
        out = forward()
        marks[1].record()
        out.backward(dout)
        marks[2].record()
        torch.cuda.synchronize()
        if repeat >= warm_up:
            times.append((marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])))
    slowest = torch.tensor(times, device="cuda")
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    forward_ms, backward_ms = (statistics.median(column) for column in zip(*slowest.tolist(), strict=True))
    return forward_ms, backward_ms


def environment() -> dict[str, Any]:
    """Device, date and the versions that matter to a measurement."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "megatron-core", "transformer-engine", "flash-attn-4", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"date": datetime.date.today().isoformat(), "device": device, "versions": versions}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` with the environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment() | results, indent=1) + "\n")
