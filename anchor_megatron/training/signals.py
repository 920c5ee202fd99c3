"""Stopping a run in good order: all ranks after the same step, with a checkpoint.

    rank 0   step 7 ................. | step 8 ........ | save, end
    rank 1   step 7 .. SIGTERM ...... | step 8 ........ | save, end
                                        the agreement of step 8 tells everyone

SIGTERM and SIGUSR1 (a scheduler's warning) and `train.max_minutes` ask for it. What each rank has to say
travels in one small all-reduce a step on the hosts, started with the step and read at its end: it costs the
step nothing.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Agreement", "StopRequests", "outlive_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OUT_OF_TIME = 1 << 16  # beyond any signal's number


class StopRequests:
    """Notes the signals that ask for a stop, between `__enter__` and `__exit__`, and the time that is up."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> int:
        """Why this rank wants to stop, as a number for `Agreement`; 0: it does not."""
        if self._received:
            return self._received
        return _OUT_OF_TIME if self._deadline is not None and time.monotonic() >= self._deadline else 0

    @staticmethod
    def describe(reason: int) -> str:
        """A reason in words."""
        return "train.max_minutes are over" if reason == _OUT_OF_TIME else signal.Signals(reason).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


class Agreement:
    """What all ranks know of each other: the largest of every value given. On the hosts, over gloo."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._values = torch.zeros(0, dtype=torch.int64)
        self._work: Any = None

    def start(self, *values: int) -> None:
        """Gives this rank's values. All ranks call it together, and then `result`."""
        self._values = torch.tensor(values, dtype=torch.int64, device="cpu")
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> list[int]:
        """The largest of each value that any rank gave."""
        self._work.wait()
        return self._values.tolist()


def outlive_signals(worker: int) -> None:
    """For a loader's process: a signal to the whole job must not end it before the training loop has stopped.

    Its parent's SIGTERM does: so a loader ends its processes.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
