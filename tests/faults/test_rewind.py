"""Loss spikes: a run goes back to before one and on behind its data, the same however often it is killed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from faults import scenes

from anchor_megatron.config import Config
from anchor_megatron.config.checks import check_config
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.testing.ranks import RankError, run_ranks
from anchor_megatron.training import spikes
from anchor_megatron.training.checkpoint import load_checkpoint
from anchor_megatron.training.checkpoint_find import folder_name, step_folders
from anchor_megatron.training.health import Diverged
from anchor_megatron.training.loop import Run
from anchor_megatron.training.report import global_sums
from anchor_megatron.training.step import StepResult, train_step

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.make_data(tmp_path_factory.mktemp("data"))


def configuration(data: Path, folder: Path, **train: Any) -> Config:
    rewinding: dict[str, Any] = dict(spike_factor=3.0, spike_window=3)
    return scenes.configuration(data, folder, train=rewinding | train)


@contextlib.contextmanager
def spiking(run: Run, batches: list[int]) -> Iterator[None]:
    """The loss of these global batches (from 1) is judged as if it were ten times as large."""

    def loss(result: StepResult) -> float:
        batch = run.watchdog.step + run.health.counts.skipped_batches
        return spikes_loss(result) * (10 if batch in batches else 1)

    spikes_loss = spikes.global_loss
    with mock.patch.object(spikes, "global_loss", loss):
        yield


def train(
    rank: int, world_size: int, config: Config, batches: list[int], kill: tuple[str, int, bool] | None
) -> tuple[str, dict[str, int], list[int]]:
    """How the run ended, its counts, and the steps of its checkpoints."""
    run, fate = Run(config), contextlib.nullcontext()
    if kill is not None:
        fate = scenes.dying_at(kill[0], call=kill[1], leaving=kill[2])
    with fate, spiking(run, batches):
        try:
            ended = run.train()
        except Diverged as error:
            ended = str(error)
    assert run.checkpointer is not None
    return ended, run.health.state(), list(step_folders(run.checkpointer.directory))


def by_hand(rank: int, world_size: int, config: Config, folder: Path, skipped: int) -> list[float]:
    """Losses of the steps behind a checkpoint, taken by a loop of its own on data behind what is skipped."""
    run = Run(config)
    step, _ = load_checkpoint(config, run.trainee, folder)
    run.health.counts.skipped_batches = skipped
    batches, losses = run._batches(step), []
    for _ in range(step, config.train.steps):
        sums = global_sums([train_step(config, run.trainee, batches)])
        losses.append(sums["loss"] / sums["loss_tokens"])
    run.close()
    return losses


def test_a_spike_rewinds_past_its_data_and_kills_change_nothing(data: Path, tmp_path: Path) -> None:
    straight, killed = (configuration(data, tmp_path / name, steps=6) for name in ("straight", "killed"))
    straight.parallel.context = killed.parallel.context = 1
    found = run_ranks(1, train, straight, [5], None)
    counts = dict(skipped=0, restarts=0, failed_saves=0, rewinds=1, skipped_batches=1)
    assert found == [("finished", counts, [6, 4])]
    losses = scenes.losses(straight)
    assert len(losses[5]) == 2 and losses[5][0] != losses[5][1], "step 5 was taken with other data"
    empty = scenes.configuration(data, tmp_path / "empty", train=dict(steps=6), parallel=dict(context=1))
    expected = run_ranks(1, by_hand, empty, tmp_path / "straight" / folder_name(4), 1)[0]
    assert [losses[step][-1] for step in (5, 6)] == expected
    # killed behind the rewind, before anything is saved there: it comes to the spike again
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(1, train, killed, [5], ("step", 6, True))
    again = run_ranks(1, train, killed, [5], None)
    assert again == [("finished", counts | {"restarts": 1}, [6, 4])]
    assert scenes.last_tensors(killed) == scenes.last_tensors(straight)
    outcome = json.loads((tmp_path / "killed" / "outcome.json").read_text())
    assert (outcome["rewinds"], outcome["skipped_batches"]) == (1, 1)


def overheard(rank: int, world_size: int, config: Config, batches: list[int]) -> Any:
    return scenes.listening(train, rank, world_size, config, batches, None)


def test_rewinds_add_up_reach_back_and_end(data: Path, tmp_path: Path) -> None:
    given = dict(rewind_steps=3, spike_window=1, max_rewinds=2)
    config = configuration(data, tmp_path / "run", **given)
    config.checkpoint.keep_last = None
    # batch 3 is step 3: no checkpoint of step 0; batch 7 is step 7: back to 4; batch 8 is step 5: back to 2,
    # from where step 3 takes batch 9; batch 14 is step 8, and there were two rewinds
    ((ended, counts, steps), heard), (other, _) = run_ranks(scenes.RANKS, overheard, config, [3, 7, 8, 14])
    assert other == (ended, counts, steps)
    assert "step 3: loss " in heard and "going on, as there is no checkpoint of step 0 or before" in heard
    assert f"back to {tmp_path}/run/step_0000004; the 3 global batches" in heard
    assert f"back to {tmp_path}/run/step_0000002; the 3 global batches" in heard
    assert (counts["rewinds"], counts["skipped_batches"]) == (2, 6)
    assert ended.startswith("step 8: loss ") and "2 rewinds before, after 2 a spike ends the run" in ended
    assert steps == [6, 4, 2], "that of the spike itself is not saved"
    documents = json.loads((tmp_path / "run" / "bad_step_0000008.json").read_text())["documents_by_window"]
    assert list(documents) == ["26", "27"], "of the fourteenth batch"


def judged(rank: int, world_size: int, config: Config, losses: list[float]) -> list[bool]:
    """Which of the losses, summed over ranks and two tokens of each, are spikes."""
    from anchor_megatron.training.setup import initialize_ranks

    initialize_ranks(config)
    found, judge = [], spikes.Spikes(config)
    for loss in losses:
        share = torch.tensor([2 * loss * (1.5 - rank), 2.0])  # their mean is the loss
        found.append(judge.judge(StepResult(share)) is not None)
    return found


def test_what_is_a_spike() -> None:
    config = tiny_config(train=dict(spike_factor=2.0, spike_window=3, global_batch_size=2))
    losses = [1.0, 9.0, 1.5, 2.9, 3.1, float("nan"), 6.0, 2.0, 6.0]
    #         the first three are none; medians 1.5, 2.9, 2.9, 2.9, 2.9, 2.9
    expected = [False] * 6 + [True, False, True]
    assert run_ranks(2, judged, config, losses) == [expected] * 2


def test_a_rewind_needs_checkpoints() -> None:
    for train, expected in (
        (dict(spike_factor=2.0), "a rewind needs a checkpoint"),
        (dict(spike_factor=0.5), "above 1"),
    ):
        with pytest.raises(ValueError, match=f"train.spike_factor: got .*{expected}"):
            check_config(tiny_config(train=train))
