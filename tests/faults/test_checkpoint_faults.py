"""Nothing that happens to a checkpoint costs more than the work since the one before, and nothing goes
unnoticed.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from faults import scenes

from anchor_megatron.config import Config
from anchor_megatron.convert.dist_files import DistReader
from anchor_megatron.testing.ranks import RankError, run_ranks
from anchor_megatron.training.checkpoint_find import delete_old, folder_name, step_folders
from anchor_megatron.training.lock import RunLock
from anchor_megatron.training.loop import Run
from anchor_megatron.training.manifest import (
    MANIFEST,
    check_files,
    listed_files,
    read_manifest,
    write_manifest,
)
from anchor_megatron.training.safe_load import check_pickles

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.make_data(tmp_path_factory.mktemp("data"))


def train(rank: int, world_size: int, config: Config) -> tuple[int, list[float]]:
    """Steps resumed from, and the seconds that each save held the steps up."""
    run = Run(config)
    first = run.first_step
    run.train()
    assert run.checkpointer is not None
    return first, run.checkpointer.stalls


def killed(rank: int, world_size: int, config: Config, victim: int, kill: tuple[str, int, bool]) -> None:
    point, call, leaving = kill
    if rank == victim:
        with scenes.dying_at(point, call=call, leaving=leaving):
            Run(config).train()
    else:
        Run(config).train()


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that nothing disturbs."""
    config = scenes.configuration(data, tmp_path_factory.mktemp("straight"))
    run_ranks(scenes.RANKS, train, config)
    return config


def test_old_checkpoints_are_deleted_and_the_end_is_told(straight: Config) -> None:
    folder = Path(str(straight.checkpoint.directory))
    assert list(step_folders(folder)) == [8, 6]
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["saves"]) == ("finished", scenes.STEPS, 4)
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize(
    ("victim", "kill"),
    [
        (1, ("asynchronous save", 3, True)),
        (0, ("commit rename", 3, True)),
        (1, ("exchange", 60, False)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else f"rank {value}",
)
def test_a_killed_rank_costs_nothing(
    victim: int, kill: tuple[str, int, bool], straight: Config, data: Path, tmp_path: Path
) -> None:
    config = scenes.configuration(data, tmp_path / "run")
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(scenes.RANKS, killed, config, victim, kill)
    run_ranks(scenes.RANKS, train, config)
    scenes.assert_same_run(config, straight)


def damaged_copy(straight: Config, folder: Path, **sections: Any) -> Config:
    """The run's folder, copied, for a run that goes on to more steps."""
    shutil.copytree(str(straight.checkpoint.directory), folder)
    return scenes.configuration(Path(straight.data.train), folder, **sections)


def overheard(rank: int, world_size: int, config: Config) -> tuple[int, str]:
    """The step resumed from, and all that the rank said."""
    (first, _), heard = scenes.listening(train, rank, world_size, config)
    return first, heard


def test_a_corrupt_checkpoint_is_passed_over_and_named(straight: Config, tmp_path: Path) -> None:
    config = damaged_copy(straight, tmp_path / "run")
    newest = tmp_path / "run" / folder_name(scenes.STEPS)
    scenes.apply(scenes.flip, newest / "__1_0.distcp", random.Random(1))
    (first, heard), (other, silent) = run_ranks(scenes.RANKS, overheard, config)
    assert (first, other, silent) == (6, 6, "")
    assert f"{newest / '__1_0.distcp'}: got SHA-256" in heard
    scenes.assert_same_run(config, straight)


def refusal(rank: int, world_size: int, config: Config) -> str:
    with pytest.raises(ValueError) as caught:
        Run(config)
    return str(caught.value)


def test_a_run_does_not_start_over_in_silence(straight: Config, tmp_path: Path) -> None:
    config = damaged_copy(straight, tmp_path / "run")
    for folder in step_folders(tmp_path / "run").values():
        (folder / MANIFEST).unlink()
    for message in run_ranks(scenes.RANKS, refusal, config):
        assert message.startswith(
            f"checkpoint.directory: {tmp_path / 'run'}: got 2 checkpoints of which none is whole"
        )


def test_every_damage_to_a_checkpoint_is_found(straight: Config, tmp_path: Path) -> None:
    whole = Path(str(straight.checkpoint.directory)) / folder_name(scenes.STEPS)
    dice, cases = random.Random(0), 0
    for name in [*listed_files(whole), MANIFEST]:
        for damage in scenes.DAMAGES.values():
            folder = tmp_path / f"case{cases}"
            shutil.copytree(whole, folder)
            if scenes.apply(damage, folder / name, dice):
                assert (fault := fault_of(folder)) is not None and str(folder) in fault, f"{name} {damage}"
                cases += 1
            shutil.rmtree(folder)
    assert cases >= 50


def fault_of(folder: Path) -> str | None:
    try:
        entries = read_manifest(folder)
        fault = check_files(folder, entries, entries)
        if fault is None:
            check_pickles(folder)
        return fault
    except ValueError as error:
        return str(error)


class Exploit:
    """Pickles to a call."""

    def __reduce__(self) -> Any:
        return os.system, ("touch exploited",)


def test_a_pickle_that_does_more_than_hold_data_is_refused(straight: Config, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(Path(str(straight.checkpoint.directory)) / folder_name(scenes.STEPS), folder)
    check_pickles(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match=r"\.metadata: refused to load it: it names (posix|nt)\.system"):
        check_pickles(folder)
    with pytest.raises(ValueError, match=r"\.metadata: refused to load it: it names (posix|nt)\.system"):
        DistReader(folder)
    assert not Path("exploited").exists()


def test_a_manifest_names_only_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_manifest(folder, step=1, known={})
    files = {"../outside": {"bytes": 1, "sha256": "0"}}
    (folder / MANIFEST).write_text(json.dumps({"step": 1, "files": files}))
    with pytest.raises(ValueError, match="got a path out of the folder"):
        read_manifest(folder)


def checkpoints(directory: Path, steps: list[int], torn: tuple[int, ...] = ()) -> None:
    for step in steps:
        folder = directory / folder_name(step)
        folder.mkdir(parents=True)
        for name in (".metadata", "metadata.json", "common.pt", "config.yaml"):
            (folder / name).write_text("x")
        write_manifest(folder, step=step, known={})
        if step in torn:
            (folder / "common.pt").unlink()


@pytest.mark.parametrize(
    ("torn", "keep_last", "keep_every", "left"),
    [
        ((), 2, None, [50, 40]),
        ((), 1, 20, [50, 40, 20]),
        ((50,), 1, None, [50, 40]),  # the newest is torn: the one before is the only good one
        ((10, 20, 30, 40, 50), 1, None, [50, 40, 30, 20, 10]),
        ((), None, None, [50, 40, 30, 20, 10]),
    ],
)
def test_what_is_deleted(
    torn: tuple[int, ...], keep_last: int | None, keep_every: int | None, left: list[int], tmp_path: Path
) -> None:
    checkpoints(tmp_path, [10, 20, 30, 40, 50], torn)
    delete_old(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert list(step_folders(tmp_path)) == left


def test_the_second_run_in_a_folder_refuses(tmp_path: Path) -> None:
    times = dict(beat_seconds=0.02, watch_seconds=0.5)
    first = RunLock(tmp_path, **times)
    with pytest.raises(
        ValueError, match=rf"lock.json: got a folder that process {os.getpid()} on .* is writing to"
    ):
        RunLock(tmp_path, **times)
    first.release()
    RunLock(tmp_path, **times).release()


@pytest.mark.parametrize(
    "left",
    [
        '{"host": "another", "pid": 1, "token": "t", "beat": 3}',
        "not JSON",
        '{"host": "HERE", "pid": 4194304}',
    ],
)
def test_a_lock_whose_holder_is_gone_is_taken_over(left: str, tmp_path: Path) -> None:
    import socket

    (tmp_path / "lock.json").write_text(left.replace("HERE", socket.gethostname()))
    lock = RunLock(tmp_path, watch_seconds=0.1)
    lock.check()
    (tmp_path / "lock.json").write_text('{"host": "another", "pid": 1, "token": "t", "beat": 3}')
    with pytest.raises(RuntimeError, match="held by process 1 on another now, expected this run"):
        lock.check()
    lock.release()
    assert (tmp_path / "lock.json").exists(), "it is another's"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="checkpoint.directory: .*file/runs: got Not a directory, expected a folder"
    ):
        RunLock(tmp_path / "file" / "runs")


def full_disk(rank: int, world_size: int, config: Config, failing: int) -> tuple[int, list[int], str]:
    """Trains while the disk of rank 1 is full for its `failing`-th file; saves that failed, steps saved,
    words.
    """
    from anchor_megatron.training import async_save

    write, calls = async_save.FileSystemWriterAsync.write_preloaded_data, [0]

    def refuse(transforms: Any, number: int, bucket: Any, results: Any, *args: Any) -> None:
        calls[0] += 1
        if rank == 1 and calls[0] == failing:
            results.put((number, OSError(errno.ENOSPC, "No space left on device")))
        else:
            write(transforms, number, bucket, results, *args)

    with mock.patch.object(async_save.FileSystemWriterAsync, "write_preloaded_data", staticmethod(refuse)):
        run = Run(config)
        _, heard = scenes.listening(run.train)
    return run.health.counts.failed_saves, list(step_folders(run.checkpointer.directory)), heard


def test_a_full_disk_costs_one_checkpoint(straight: Config, data: Path, tmp_path: Path) -> None:
    config = scenes.configuration(data, tmp_path / "run", checkpoint=dict(keep_last=None))
    (*first, told), (*other, _) = run_ranks(scenes.RANKS, full_disk, config, 3)
    assert first == other == [1, [8, 6, 2]]
    assert "could not save" in told and "step_0000004.partial" in told and "No space left on device" in told
    assert not (tmp_path / "run" / "step_0000004.partial").exists()
    scenes.assert_same_run(config, straight)
