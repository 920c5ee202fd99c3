"""One step's timeline from torch's profiler: what ran on which stream when, and where the host waited."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Kernel", "draw_timeline", "host_waits", "overlap", "trace"]

# kernels by what they do, in the order in which the words are looked for
_KINDS = {
    "exchange": ("nccldevkernel_sendrecv", "nccldevkernel_alltoall"),
    "other NCCL": ("nccl",),
    "attention": ("flash", "cudnn_generated", "sdpa", "fmha"),
    "rows": ("_gather", "_sum"),
    "cross entropy": ("_statistics", "_gradient"),
    "matrix product": ("gemm", "nvjet", "cutlass"),
}
_COLOURS = {
    "exchange": "tab:red",
    "other NCCL": "tab:pink",
    "attention": "tab:blue",
    "rows": "tab:green",
    "cross entropy": "tab:purple",
    "matrix product": "tab:orange",
    "other": "lightgrey",
}
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Kernel:
    """One kernel on the device; times in microseconds."""

    name: str
    kind: str
    stream: int
    start: float
    duration: float


def trace(step: Callable[[], None]) -> tuple[list[Kernel], Counter[str]]:
    """Runs `step` once under the profiler; its kernels in order, and the host's waits by name.

    Waits that an empty step shows as well are the profiler's own and left out.
    """
    events = _events(step)
    kernels = [
        Kernel(e["name"], kind_of(e["name"]), e["args"]["stream"], e["ts"], e["dur"])
        for e in events
        if e.get("cat") == "kernel"
    ]
    waits = host_waits(events) - host_waits(_events(lambda: None))
    return sorted(kernels, key=lambda kernel: kernel.start), waits


def _events(step: Callable[[], None]) -> list[dict[str, Any]]:
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def host_waits(events: list[dict[str, Any]]) -> Counter[str]:
    """Calls in which the host waited for the device, by name."""
    return Counter(
        event["name"] for event in events if event.get("cat") == "cuda_runtime" and event["name"] in _WAITS
    )


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    lower = name.lower()
    for kind, words in _KINDS.items():
        if any(word in lower for word in words):
            return kind
    return "other"


def overlap(kernels: list[Kernel]) -> tuple[float, float]:
    """Milliseconds of exchange, and how many of them lie under attention on another stream."""
    attention = [k for k in kernels if k.kind == "attention"]
    total = hidden = 0.0
    for kernel in kernels:
        if kernel.kind == "exchange":
            total += kernel.duration
            end = kernel.start + kernel.duration
            hidden += sum(
                max(0.0, min(end, a.start + a.duration) - max(kernel.start, a.start)) for a in attention
            )
    return total / 1e3, hidden / 1e3


def draw_timeline(kernels: list[Kernel], path: Path, *, title: str) -> None:
    """Draws the whole step and, below it, one layer's attention forward and backward; a lane a stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    exchanges = [k for k in kernels if k.kind == "exchange"]
    spans = [(kernels[0].start, kernels[-1].start + kernels[-1].duration)]
    spans += [_around(kernels, exchange) for exchange in (exchanges[:1] + exchanges[-1:])]
    names = [
        "whole step",
        "one layer, forward: the exchange flies under the local pieces",
        "one layer, backward",
    ]
    figure, panels = plt.subplots(
        len(spans), 1, figsize=(14, 2.1 * len(spans) + 0.6), layout="constrained", squeeze=False
    )
    streams = sorted({k.stream for k in kernels})
    for panel, (first, last), name in zip(panels[:, 0], spans, names, strict=False):
        for kernel in kernels:
            if kernel.start + kernel.duration > first and kernel.start < last:
                lane = streams.index(kernel.stream)
                panel.barh(
                    lane,
                    kernel.duration / 1e3,
                    left=(kernel.start - first) / 1e3,
                    color=_COLOURS[kernel.kind],
                )
        panel.set(xlim=(0, (last - first) / 1e3), xlabel="ms", title=name)
        panel.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
        panel.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, _COLOURS, loc="outside lower center", ncols=len(_COLOURS))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _around(kernels: list[Kernel], exchange: Kernel) -> tuple[float, float]:
    """From shortly before an exchange to the end of the attention kernels near it."""
    near = [k for k in kernels if k.kind == "attention" and abs(k.start - exchange.start) < 25e3]
    last = max([exchange.start + exchange.duration, *(k.start + k.duration for k in near)])
    first = min([exchange.start, *(k.start for k in near)])
    return first - 300, last + 300
