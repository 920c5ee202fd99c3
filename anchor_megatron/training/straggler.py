"""Which rank holds the others up: every rank's own time in forward passes, side by side.

    rank            0      1      2      3
    forward, s   1.20   1.21   1.19   1.63     median 1.2, slowest 1.63 of rank 3

A step takes equally long on all ranks, as they wait for one another at its end. A replica's forward passes
wait for no other replica, so a machine that is slow shows there; and so does a slow disk in the time a rank
waited for its data.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from anchor_megatron.model.builder import rank_device

__all__ = ["ForwardTimer", "spread"]


class ForwardTimer:
    """Times the forward passes of `model` from now on; on a GPU by events, which cost the host no waiting."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._marks: list[Any] = []  # begin, end, begin, end, ...
        model.register_forward_pre_hook(lambda *_: self._mark())
        model.register_forward_hook(lambda *_: self._mark())

    def take(self) -> float:
        """Seconds in forward passes since the last call, which must lie behind the end of a step."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks.clear()
        if not torch.cuda.is_available():
            return sum(end - begin for begin, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def _mark(self) -> None:
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


def spread(*, forward: float, waited: float) -> dict[str, float]:
    """This rank's seconds in forward passes, and of waiting for data in a step, set beside all others' (one
    gather).
    """
    own = torch.tensor([forward, waited], dtype=torch.float64, device=rank_device())
    gathered = torch.empty(dist.get_world_size() * 2, dtype=torch.float64, device=rank_device())
    dist.all_gather_into_tensor(gathered, own)
    forwards, waits = gathered.view(-1, 2).T.tolist()
    return {
        "forward_seconds_median": statistics.median(forwards),
        "forward_seconds_slowest": max(forwards),
        "slowest_rank": forwards.index(max(forwards)),
        "data_wait_ms": 1e3 * max(waits),
    }
