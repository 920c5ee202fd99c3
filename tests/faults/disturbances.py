"""What happens around a run that trains: disks fill or slow down, files vanish, clocks jump.

with at_steps(run, {3: lambda: os.unlink("set.bin")}):     step 1   step 2   (gone)   step 3 ...
    run.train()
"""

from __future__ import annotations

import contextlib
import errno
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from anchor_megatron.data.documents import Documents
from anchor_megatron.training.async_save import ThreadedStrategy
from anchor_megatron.training.loop import Run


@contextlib.contextmanager
def at_steps(run: Run, actions: Mapping[int, Callable[[], object]]) -> Iterator[None]:
    """Does something as a step begins."""
    start = run.agreement.start

    def hooked(*values: int) -> None:
        actions.get(run.watchdog.step, lambda: None)()
        start(*values)

    with mock.patch.object(run.agreement, "start", hooked):
        yield


@contextlib.contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Every file of a checkpoint, and every window's tokens, take so much longer."""
    write, read = ThreadedStrategy._write_file, Documents.tokens

    def slowly(*given: Any) -> Any:
        time.sleep(seconds)
        return (write if isinstance(given[0], ThreadedStrategy) else read)(*given)

    with (
        mock.patch.object(ThreadedStrategy, "_write_file", slowly),
        mock.patch.object(Documents, "tokens", slowly),
    ):
        yield


@contextlib.contextmanager
def jumping_clock() -> Iterator[None]:
    """The time of day is another day's at every look."""
    dice, clock = random.Random(0), time.time
    with mock.patch("time.time", lambda: clock() + dice.uniform(-1e6, 1e6)):
        yield


@contextlib.contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system of its own in `folder` (Linux, root)."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def fill(folder: Path) -> None:
    """Writes until nothing more fits."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
