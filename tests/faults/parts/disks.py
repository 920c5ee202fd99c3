"""Runs whose disk, data or clock fails them on the way, beside one that nothing disturbs.

a full disk at the second of three saves     that save is given up and counted, the run ends as if nothing was
the data file cut off under the run          a rank dies; the next start refuses and names the file
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from faults import disturbances, scenes
from faults.parts import Part

from anchor_megatron.config import Config
from anchor_megatron.testing.ranks import RankError, run_ranks
from anchor_megatron.training.async_save import ThreadedStrategy
from anchor_megatron.training.loop import Run

STEPS, INTERVAL = 12, 4  # saves after 4, 8 and 12; the second one meets the fault
SLOW = 0.3  # seconds a file, and a read


def train(rank: int, world_size: int, config: Config, how: str) -> tuple[dict[str, int], str]:
    """The run's counts, and all that the rank said."""
    run = Run(config)
    with DISTURBANCES[how](run, rank):
        _, heard = scenes.listening(run.train)
    return run.health.state(), heard


@contextlib.contextmanager
def full(run: Run, rank: int) -> Iterator[None]:
    """The first rank's disk fills as the second save begins to write, and has room again two steps later."""
    disk, start = Path(str(run.config.checkpoint.directory)).parent, ThreadedStrategy.start

    def filling(writer: ThreadedStrategy) -> None:
        if rank == 0 and run.watchdog.step == 2 * INTERVAL:
            disturbances.fill(disk)
        start(writer)

    def room() -> None:
        run.checkpointer._writer.wait()  # type: ignore[union-attr]
        (disk / "filler").unlink()

    with mock.patch.object(ThreadedStrategy, "start", filling):
        with disturbances.at_steps(run, {2 * INTERVAL + 2: room} if rank == 0 else {}):
            yield


@contextlib.contextmanager
def read_only(run: Run, rank: int) -> Iterator[None]:
    disk = str(Path(str(run.config.checkpoint.directory)).parent)
    remounts = {
        2 * INTERVAL: lambda: disturbances.mount("-o", "remount,ro", disk),
        2 * INTERVAL + 2: lambda: disturbances.mount("-o", "remount,rw", disk),
    }
    with disturbances.at_steps(run, remounts if rank == 0 else {}):
        yield


@contextlib.contextmanager
def slow(run: Run, rank: int) -> Iterator[None]:
    with disturbances.slow_disk(SLOW if rank else 0.0):
        yield


@contextlib.contextmanager
def clock(run: Run, rank: int) -> Iterator[None]:
    with disturbances.jumping_clock():
        yield


@contextlib.contextmanager
def gone(run: Run, rank: int) -> Iterator[None]:
    path = f"{run.config.data.train}.bin"
    with disturbances.at_steps(run, {INTERVAL + 2: lambda: os.unlink(path)} if rank == 0 else {}):
        yield


@contextlib.contextmanager
def cut(run: Run, rank: int) -> Iterator[None]:
    path = f"{run.config.data.train}.bin"
    with disturbances.at_steps(run, {INTERVAL + 2: lambda: os.truncate(path, 0)} if rank == 0 else {}):
        yield


@contextlib.contextmanager
def nothing(run: Run, rank: int) -> Iterator[None]:
    yield


DISTURBANCES: dict[str, Callable[[Run, int], contextlib.AbstractContextManager[None]]] = {
    "nothing": nothing, "full": full, "read-only": read_only, "slow": slow, "clock": clock, "gone": gone,
    "cut": cut,
}  # fmt: skip


def refusal(rank: int, world_size: int, config: Config) -> str:
    """What a start says, "" where it starts."""
    try:
        Run(config).close()
    except ValueError as error:
        return str(error)
    return ""


def configuration(data: Path, folder: Path, directory: Path) -> Config:
    return scenes.configuration(
        data,
        folder,
        train=dict(steps=STEPS),
        checkpoint=dict(directory=str(directory), save_interval=INTERVAL),
    )


def disks(data: Path, folder: Path) -> Part:
    """All of them, one after another."""
    part = Part()
    straight = configuration(data, folder / "straight", folder / "straight")
    run_ranks(scenes.RANKS, train, straight, "nothing")
    for how in ("full", "read-only"):
        _failing_disk(part, how, data, folder / how, straight)
    for how, what in (("slow", "a slow disk"), ("clock", "a clock that jumps by days")):
        config = configuration(data, folder / how, folder / how)
        counts, _ = run_ranks(scenes.RANKS, train, config, how)[0]
        part.add(what, "the same run", ok=_same(config, straight) and not counts["failed_saves"])
    for how, what in (("gone", "a data file deleted"), ("cut", "a data file cut to nothing")):
        _failing_data(part, what, how, data, folder / how, straight)
    return part


def _failing_disk(part: Part, how: str, data: Path, folder: Path, straight: Config) -> None:
    folder.mkdir()
    try:
        with disturbances.small_disk(folder / "disk", megabytes=64) as disk:
            config = configuration(data, folder, disk / "run")
            counts, heard = run_ranks(scenes.RANKS, train, config, how)[0]
            why = {"full": "No space left on device", "read-only": "Read-only file system"}[how]
            good = counts["failed_saves"] == 1 and "could not save" in heard and why in heard
            part.add(
                f"a disk that is {how} during a save (a real one)",
                "that save given up and counted, the run the same",
                ok=good and _same(config, straight),
            )
            if how == "read-only":
                disturbances.mount("-o", "remount,ro", str(disk))
                told = run_ranks(scenes.RANKS, refusal, configuration(data, folder, disk / "new"))[0]
                named = f"checkpoint.directory: {disk / 'new'}: got Read-only" in told
                part.add("a read-only disk from the start", "refused, the folder named", ok=named)
    except (OSError, subprocess.CalledProcessError) as error:
        part.add(f"a disk that is {how}", f"not tried: {error}", ok=True)


def _failing_data(part: Part, what: str, how: str, data: Path, folder: Path, straight: Config) -> None:
    """A deleted file's bytes stay mapped, so the run ends well; one that is cut takes its readers along."""
    folder.mkdir()
    for path in data.parent.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    config = configuration(folder / data.name, folder / "run", folder / "run")
    try:
        run_ranks(scenes.RANKS, train, config, how)
        ended = "the run the same" if _same(config, straight) else "another run"
    except RankError as error:
        ended = "a rank dies" if "exit code -7" in str(error) else str(error)
    named = f"{folder / data.name}.bin: " in run_ranks(scenes.RANKS, refusal, config)[0]
    shutil.copy(data.with_suffix(".bin"), folder)
    run_ranks(scenes.RANKS, train, config, "nothing")
    start = "refused, the file named" if named else "began"
    found = f"{ended}; the next start {start}; restored, the run the same"
    part.add(
        what, found, ok=named and ended in ("the run the same", "a rank dies") and _same(config, straight)
    )


def _same(config: Config, straight: Config) -> bool:
    try:
        scenes.assert_same_run(config, straight)
    except AssertionError as error:
        print(error)
        return False
    return True
