"""A rank that hangs or is gone ends the job, and the message says which and in what.

    rank 0   progress 412   step 40, computing   all_reduce #1207 of tp   12 s ago
    rank 1   progress 411   step 40, waiting for data   ...              631 s ago    <- behind

Every rank counts its progress (each micro-batch, each save) and a thread of its own publishes it in the
job's store. A rank whose progress stands still for too long, be it the culprit or one that waits for it,
reads everyone's, twice: a rank that no longer publishes is gone or stopped, and of those that do, the ones
with the least progress are behind. The last collective is torch's flight recorder's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from anchor_megatron.training.batch import PlannedBatch

__all__ = ["Watchdog", "last_collective"]

_EXIT_CODE = 3


class Watchdog:
    """Ends the process when `at` and `batches` have not been called for `limit_seconds`, naming the ranks
    behind.

    All ranks make one. `end` is what it does then, with the message.
    """

    def __init__(self, limit_seconds: float, *, end: Callable[[str], Any] | None = None) -> None:
        self.limit = limit_seconds
        self.step = 0
        self.phase = "setting up"
        self._progress, self._ticks, self._since = 0, 0, time.monotonic()
        self._end = end or _end_process
        self._interval = min(10.0, limit_seconds / 10)
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(
            "watchdog", store.clone()
        )  # a wait of the main thread would lock its own
        self._publish()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, phase: str, *, step: int | None = None) -> None:
        """The run goes on: with `phase`, of `step`."""
        self.step = self.step if step is None else step
        self.phase = phase
        self._since = time.monotonic()
        self._progress += 1

    def batches(self, source: Iterator[PlannedBatch]) -> Iterator[PlannedBatch]:
        """`source`, each batch counting as progress."""
        while True:
            self.at("waiting for data")
            batch = next(source, None)
            if batch is None:
                return
            self.at("computing")
            yield batch

    def close(self) -> None:
        """Watches no longer. Idempotent."""
        self._stopped.set()
        self._thread.join()

    def who_is_behind(self) -> str:
        """A line for every rank that is gone or behind. Takes a few publishing intervals."""
        self._publish()
        before = self._records()
        for _ in range(3):  # others may be asking at the same time, and must see that this rank lives
            self._stopped.wait(self._interval)
            self._publish()
        after = self._records()
        silent = [
            rank for rank, record in after.items() if record == before.get(rank) and record != self._own()
        ]
        least = min(record.get("progress", 0) for record in after.values())
        behind = silent or [rank for rank, record in after.items() if record.get("progress", 0) == least]
        what = "gives no sign of life since" if silent else "is furthest behind, at"
        if len(behind) == len(after):
            what = "stands, like all others, at"
        return "\n".join(f"rank {rank} {what} {_describe(after[rank])}" for rank in behind)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._publish()
                seen, still = self._progress, time.monotonic() - self._since
                if still < self.limit:
                    continue
                message = self.who_is_behind()
                first = self._store.add("alarm", 1) == 1
            except (dist.DistError, RuntimeError) as error:  # the store went with its host
                still = time.monotonic() - self._since
                if still < self.limit:
                    continue
                seen, first, message = self._progress, True, f"and the job's store is gone: {error}"
            if self._progress != seen or self._stopped.is_set():
                continue
            told = (
                f"rank {dist.get_rank()}, step {self.step}: no progress for {still:.0f} s while {self.phase}"
            )
            self._end(f"{told}; ending the job\n{message if first else 'another rank says who is behind'}")
            return

    def _own(self) -> dict[str, Any]:
        return {
            "ticks": self._ticks, "progress": self._progress, "step": self.step, "phase": self.phase,
            "collective": last_collective(),
        }  # fmt: skip

    def _publish(self) -> None:
        self._ticks += 1
        self._store.set(str(dist.get_rank()), json.dumps(self._own()))

    def _records(self) -> dict[int, dict[str, Any]]:
        """Every rank's last record; an empty one of a rank that never published."""
        ranks = [rank for rank in range(dist.get_world_size()) if self._store.check([str(rank)])]
        values = self._store.multi_get([str(rank) for rank in ranks])
        found = {rank: json.loads(value) for rank, value in zip(ranks, values, strict=True)}
        return {rank: found.get(rank, {}) for rank in range(dist.get_world_size())}


def last_collective() -> str:
    """The last collective that this rank started, as torch's flight recorder has it."""
    dump = getattr(c10d, "_dump_nccl_trace_json", None) if dist.get_backend() == "nccl" else None
    try:
        recorded = json.loads((dump or c10d._dump_fr_trace_json)(True, False))  # type: ignore[attr-defined]
        entries = recorded.get("entries", [])
    except (RuntimeError, ValueError, TypeError):
        return "not recorded"
    if not entries:
        return "none"
    last = entries[-1]
    group = last.get("process_group", ["", ""])
    return f"{last.get('profiling_name')} #{last.get('collective_seq_id')} of {group[1] or group[0]}"


def _describe(record: dict[str, Any]) -> str:
    if not record:
        return "the start: it never reported"
    return f"step {record['step']}, {record['phase']}; last collective: {record['collective']}"


def _end_process(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(_EXIT_CODE)  # the main thread may be stuck beyond the reach of an exception
