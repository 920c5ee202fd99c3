"""One output folder, one run: the second refuses.

    runs/a/lock.json    {"host": "node7", "pid": 4711, "token": "5c0f...", "beat": 1203}

The holder raises `beat` every few seconds. Who comes second looks at the beat twice, without asking any
clock: if it moves, the holder lives. A holder on the same host whose process is gone needs no watching. So
a lock left by a machine that failed is taken over after `WATCH_SECONDS`, and one left by a killed process
at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

__all__ = ["RunLock"]

_log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # a holder's beat must not move for so long before it counts as gone


class RunLock:
    """Holds `folder` until `release`. ValueError where another run holds it or the folder cannot be
    written.
    """

    def __init__(
        self, folder: Path, *, beat_seconds: float = BEAT_SECONDS, watch_seconds: float = WATCH_SECONDS
    ):
        self.path = folder / "lock.json"
        self._own: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "beat": 0
        }  # fmt: skip
        self._lost = False
        self._released = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take(watch_seconds)
        except OSError as error:
            raise ValueError(
                f"checkpoint.directory: {folder}: got {error.strerror}, expected a folder that can be written"
            ) from error
        self._thread = threading.Thread(target=self._beat, args=(beat_seconds,), name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """RuntimeError where another run took the folder over (this one was cut off for too long)."""
        holder = _read(self.path)
        if self._lost or holder is None or holder.get("token") != self._own["token"]:
            raise RuntimeError(
                f"{self.path}: held by {_name(holder)} now, expected this run; it must not write there"
            )

    def release(self) -> None:
        """Gives the folder back. Idempotent."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        holder = _read(self.path)
        if holder is not None and holder.get("token") == self._own["token"]:
            self.path.unlink(missing_ok=True)

    def _take(self, watch_seconds: float) -> None:
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._remove_stale(watch_seconds)
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._own, file)
            return

    def _remove_stale(self, watch_seconds: float) -> None:
        """Removes the lock of a holder that is gone; ValueError where it lives."""
        holder = _read(self.path)
        gone = (
            holder is not None and holder.get("host") == self._own["host"] and not _alive(holder.get("pid"))
        )
        deadline = time.monotonic() + watch_seconds
        while not gone and time.monotonic() < deadline:
            time.sleep(min(0.2, watch_seconds / 5))
            now = _read(self.path)
            if now is None and not self.path.exists():
                return
            if now != holder and now is not None and holder is not None:
                raise ValueError(
                    f"{self.path}: got a folder that {_name(now)} is writing to, expected one of its own for "
                    "every run; stop the other run or set another checkpoint.directory"
                )
            holder = now
        _log.warning("%s: left by %s, which is gone; taking it over", self.path, _name(holder))
        aside = self.path.with_suffix(f".{self._own['token']}")
        try:
            self.path.rename(aside)  # of several that come at once, one succeeds
        except FileNotFoundError:
            return
        aside.unlink()

    def _beat(self, seconds: float) -> None:
        aside = self.path.with_suffix(".beat")
        while not self._released.wait(seconds):
            holder = _read(self.path)
            if holder is not None and holder.get("token") != self._own["token"]:
                self._lost = True
                return
            self._own["beat"] += 1
            try:
                aside.write_text(json.dumps(self._own))
                aside.replace(self.path)
            except OSError as error:  # a full disk must not end the run here: saving will say so
                _log.warning("%s: cannot be renewed: %s", self.path, error)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _alive(pid: Any) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, TypeError):
        return False


def _name(holder: dict[str, Any] | None) -> str:
    return "nobody" if holder is None else f"process {holder.get('pid')} on {holder.get('host')}"
