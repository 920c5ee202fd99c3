"""Runs that are asked to stop, that hang, that diverge, that lose a rank: each ends in order and says why."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faults import scenes

from anchor_megatron.config import Config, save_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.batch import PlannedBatch
from anchor_megatron.training.errors import explain
from anchor_megatron.training.health import Diverged
from anchor_megatron.training.loop import Run
from anchor_megatron.training.signals import Agreement, StopRequests, outlive_signals
from anchor_megatron.training.straggler import ForwardTimer, spread
from anchor_megatron.training.watchdog import Watchdog

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.make_data(tmp_path_factory.mktemp("data"))


def outcome(config: Config) -> dict[str, Any]:
    return json.loads((Path(str(config.checkpoint.directory)) / "outcome.json").read_text())


def signalled(rank: int, world_size: int, config: Config, number: int, at: int) -> str:
    """Trains; the last rank gets the signal while it waits for the batch of step `at`."""
    run = Run(config)
    run.batches = _interrupted(run.batches, number if rank == world_size - 1 else 0, at - run.first_step)
    return run.train()


def _interrupted(batches: Iterator[PlannedBatch], number: int, at: int) -> Iterator[PlannedBatch]:
    for item, batch in enumerate(batches):
        if item == 2 * (at - 1) and number:  # two micro-batches a step
            os.kill(os.getpid(), number)
        yield batch


def test_a_signal_to_one_rank_stops_all_after_a_step_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    straight, stopped = (scenes.configuration(data, tmp_path / name) for name in ("straight", "stopped"))
    assert run_ranks(scenes.RANKS, signalled, straight, 0, 1) == ["finished"] * 2
    assert run_ranks(scenes.RANKS, signalled, stopped, signal.SIGUSR1, 5) == ["stopped"] * 2
    assert outcome(stopped)["reason"] == "SIGUSR1"
    step = outcome(stopped)["step"]
    assert step in (5, 6), "the signal came in step 5, after its agreement or before"
    assert (tmp_path / "stopped" / f"step_{step:07d}").is_dir()
    assert run_ranks(scenes.RANKS, signalled, stopped, 0, 1) == ["finished"] * 2
    scenes.assert_same_run(stopped, straight)


def test_the_time_that_is_over_stops_a_run(data: Path, tmp_path: Path) -> None:
    config = scenes.configuration(data, tmp_path, parallel=dict(context=1), train=dict(max_minutes=0.0))
    assert run_ranks(1, signalled, config, 0, 1) == ["stopped"]
    assert (outcome(config)["step"], outcome(config)["reason"]) == (1, "train.max_minutes are over")


def agreed(rank: int, world_size: int) -> list[int]:
    agreement = Agreement()
    agreement.start(rank == 1, 7 * rank)
    return agreement.result()


def test_ranks_agree_on_the_largest() -> None:
    assert run_ranks(2, agreed) == [[1, 7]] * 2


def wait_long(worker: int) -> None:
    outlive_signals(worker)
    time.sleep(60)


def test_a_loader_process_ends_by_its_parent_alone() -> None:
    child = multiprocessing.get_context("fork").Process(target=wait_long, args=(0,))
    child.start()
    time.sleep(0.3)
    subprocess.run(["kill", "-TERM", str(child.pid)], check=True)  # sent by another process
    child.join(0.3)
    assert child.is_alive()
    child.terminate()
    child.join(5)
    assert child.exitcode == 0


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert StopRequests.describe(stop.reason) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def watched(rank: int, world_size: int, stuck: int) -> list[str]:
    """What the watchdog of a rank says while `stuck` does not come to where the others wait."""
    messages: list[str] = []
    watchdog = Watchdog(0.6, end=messages.append)
    torch.distributed.all_reduce(torch.zeros(3))
    watchdog.at("computing", step=7)
    if rank != stuck:
        watchdog.at("reducing")
    deadline = time.monotonic() + 10
    while not messages and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.close()
    return messages


def test_the_rank_that_hangs_is_named() -> None:
    told = [message for (message,) in run_ranks(3, watched, 1)]
    full = [message for message in told if "is furthest behind" in message]
    assert len(full) == 1, "one rank speaks for all"
    assert "no progress for" in full[0]
    assert "\nrank 1 is furthest behind, at step 7, computing; last collective: gloo:all_reduce #" in full[0]
    assert all("another rank says who is behind" in message for message in told if message != full[0])


def stopped_dead(rank: int, world_size: int) -> str:
    """Rank 0 asks who is behind while rank 1 publishes no more, as one that the system has stopped."""
    watchdog = Watchdog(1.0, end=print)
    if rank == 1:
        watchdog.close()
        torch.distributed.barrier()
        return ""
    time.sleep(0.2)
    told = watchdog.who_is_behind()
    watchdog.close()
    torch.distributed.barrier()
    return told


def test_a_rank_without_a_sign_of_life_is_named() -> None:
    told, _ = run_ranks(2, stopped_dead)
    assert told.startswith("rank 1 gives no sign of life since step 0, setting up")


def test_a_few_bad_steps_are_skipped_and_too_many_end_the_run(data: Path, tmp_path: Path) -> None:
    few = scenes.configuration(data, tmp_path / "few", train=dict(max_bad_steps=2))
    assert [found[:2] for found in run_ranks(scenes.RANKS, infinite, few, [3, 5])] == [
        ("finished", {"skipped": 2, "restarts": 0, "failed_saves": 0, "rewinds": 0, "skipped_batches": 0})
    ] * 2
    many = scenes.configuration(data, tmp_path / "many", train=dict(max_bad_steps=2))
    for ended, counts in run_ranks(scenes.RANKS, infinite, many, [3, 5, 6]):
        assert ended.startswith("step 6: loss or gradient not finite; the update is skipped (2 in a row")
        assert counts["skipped"] == 3
    written = json.loads((tmp_path / "many" / "bad_step_0000006.json").read_text())
    assert list(written["documents_by_window"]) == ["10", "11"]
    assert all(written["documents_by_window"].values())


def infinite(rank: int, world_size: int, config: Config, steps: list[int]) -> tuple[str, dict]:
    """Trains with an infinite loss on the last rank in the given steps, whatever its gradient."""
    from anchor_megatron.training import step as module

    run = Run(config)
    report = module._report_loss

    def spoil(loss_mask: torch.Tensor, total: torch.Tensor) -> Any:
        bad = run.watchdog.step in steps and rank == world_size - 1
        return report(loss_mask, total + float("inf") if bad else total)

    module._report_loss = spoil
    try:
        return run.train(), run.health.state()
    except Diverged as error:
        return str(error), run.health.state()
    finally:
        module._report_loss = report


def weights_around(rank: int, world_size: int, config: Config) -> bool:
    """Whether a step with an infinite weight leaves all others as they were."""
    from anchor_megatron.training.step import train_step

    run = Run(config)
    parameters = dict(run.trainee.gpt.named_parameters())
    next(iter(parameters.values())).data[:2] = float("inf")
    before = {name: value.detach().clone() for name, value in parameters.items()}
    result = train_step(config, run.trainee, run.batches)
    run.close()
    assert not result.updated
    return all(torch.equal(before[name], value) for name, value in parameters.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing(precision: str, data: Path, tmp_path: Path) -> None:
    config = scenes.configuration(
        data, tmp_path, parallel=dict(context=1), train=dict(precision=precision), data=dict(seq_length=16)
    )
    assert run_ranks(1, weights_around, config) == [True]


def slow_forward(rank: int, world_size: int) -> dict[str, float]:
    layer = torch.nn.Linear(2, 2)
    timer = ForwardTimer(layer)
    layer.register_forward_pre_hook(lambda *_: time.sleep(0.05 if rank == 2 else 0.0))
    layer(torch.ones(1, 2))
    return spread(forward=timer.take(), waited=float(rank))


def test_the_slowest_rank_is_told() -> None:
    for told in run_ranks(3, slow_forward):
        assert (told["slowest_rank"], told["data_wait_ms"]) == (2, 2000.0)
        assert told["forward_seconds_slowest"] > 0.05 > told["forward_seconds_median"]


def test_an_error_says_who_when_and_what_to_do() -> None:
    error = RuntimeError("[gloo] Connection closed by peer [10.0.0.7]:4711")
    told = explain(error, rank=3, step=120, phase="computing", saved=100)
    assert told.startswith("rank 3, step 120, computing: RuntimeError: [gloo] Connection closed")
    assert told.endswith("look for its message. The same command goes on from step 100.")
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
    told = explain(error, rank=3, step=120, phase="waiting for data", saved=None)
    assert told.endswith(
        "A data file was cut off, its disk failed, or /dev/shm is full. The same command starts over."
    )


@pytest.mark.slow
def test_torchrun_brings_a_killed_rank_back(data: Path, tmp_path: Path) -> None:
    straight, config = (scenes.configuration(data, tmp_path / name) for name in ("straight", "run"))
    run_ranks(scenes.RANKS, signalled, straight, 0, 1)
    save_config(config, tmp_path / "run.yaml")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    with (tmp_path / "output.txt").open("w") as file:
        process = subprocess.Popen(
            [*words, "--max-restarts", "1", str(ROOT / "pretrain_anchor.py"), str(tmp_path / "run.yaml")],
            stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "step_0000004").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.01)
    ranks = [
        one
        for one in psutil.Process(process.pid).children()
        if "pretrain_anchor.py" in " ".join(one.cmdline())
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(timeout=120) == 0, (tmp_path / "output.txt").read_text()
    found = outcome(config)
    assert (found["outcome"], found["step"], found["restarts"]) == ("finished", scenes.STEPS, 1)
    scenes.assert_same_run(config, straight)
