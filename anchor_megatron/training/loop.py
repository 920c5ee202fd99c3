"""The run: set up, resume where there is something to resume from, step, report, save, stop in good order."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Iterator

import torch.distributed as dist

from anchor_megatron.config import Config, data_sets
from anchor_megatron.data.documents import Documents
from anchor_megatron.model.builder import rank_device
from anchor_megatron.training.batch import PlannedBatch
from anchor_megatron.training.checkpoint import (
    Checkpointer,
    SaveFailed,
    load_checkpoint,
    load_pretrained,
    newest_good,
)
from anchor_megatron.training.errors import explain
from anchor_megatron.training.evaluation import Evaluation
from anchor_megatron.training.health import Diverged, Health, write_outcome
from anchor_megatron.training.loader import BatchDataset, batches, open_windows
from anchor_megatron.training.monitor import Monitor
from anchor_megatron.training.probe import check_run
from anchor_megatron.training.report import Reporter
from anchor_megatron.training.setup import initialize_ranks
from anchor_megatron.training.signals import Agreement, StopRequests
from anchor_megatron.training.spikes import Spikes
from anchor_megatron.training.step import StepResult, build_trainee, train_step
from anchor_megatron.training.straggler import ForwardTimer, spread
from anchor_megatron.training.watchdog import Watchdog

__all__ = ["Run", "complete"]


class Run:
    """A run that is ready to step: everything a user can get wrong has been looked at.

    Resumes from the newest good checkpoint in `checkpoint.directory` where there is one. Raises ValueError
    for a configuration, data set or checkpoint that does not fit, and where another run writes to that
    folder.
    """

    def __init__(self, config: Config) -> None:
        if not gc.get_freeze_count():  # of a process's first run: a later one would freeze the one before
            gc.collect()
            gc.freeze()  # Megatron-Core collects garbage in each save: 0.3 s, most of it for imported modules
        self.config = config = complete(config)
        self.windows = windows = open_windows(config)
        self.evaluation = Evaluation(config, windows.corpus)
        initialize_ranks(config)
        self.checkpointer = Checkpointer(config) if config.checkpoint.directory is not None else None
        try:
            self.health, self.spikes = Health(config, windows), Spikes(config)
            self.trainee = build_trainee(config)
            self.first_step = self.saved = self._resume()
            self.batches = self._batches(self.first_step)
            self.forward = ForwardTimer(self.trainee.model)
            self.reporter = Reporter(config, self._spread)
            self.monitor = Monitor(config, self.trainee.gpt)
            self.agreement = Agreement()
        except BaseException:
            self.close()
            raise

    def check(self) -> bool:
        """Looks for leaks in the next step's first micro-batch (see `probe.py`), says what it found, returns
        whether all is well. All ranks call it together.
        """
        dataset = BatchDataset(self.config, self.windows)
        next_batch = self.first_step + self.health.counts.skipped_batches
        checks = check_run(self.config, self.trainee, dataset.windows_of(next_batch * dataset.micro_batches))
        passed = all(check.passed for check in checks)
        _say("\n".join([*map(str, checks), f"check {'passed' if passed else 'FAILED'}"]))
        return passed

    def train(self) -> str:
        """Steps to `train.steps`, reporting and saving on the way, or to the step after which it is asked
        to stop.

        All ranks call it together. Returns "finished" or "stopped"; an error is printed with rank, step and
        the action to take before it is raised.
        """
        self.watchdog = Watchdog(0.9 * 60 * self.config.train.distributed_timeout_minutes)
        try:
            with StopRequests(self.config.train.max_minutes) as stop:
                step, reason = self._steps(stop)
        except Exception as error:
            at = dict(rank=dist.get_rank(), step=self.watchdog.step, phase=self.watchdog.phase)
            print(explain(error, **at, saved=self.saved or None), file=sys.stderr, flush=True)  # type: ignore[arg-type]
            raise
        finally:
            self.watchdog.close()
            self.close()
        return self._tell(step, reason)

    def close(self) -> None:
        """Gives the checkpoints' folder back. Idempotent."""
        if self.checkpointer is not None:
            self.checkpointer.close()

    def _steps(self, stop: StopRequests) -> tuple[int, int]:
        """The last step taken, and why it was the last (0: it was to be)."""
        step, reason = self.first_step, 0
        while step < _last_step(self.config) and not reason:
            step += 1
            self.watchdog.at("starting", step=step)
            self.agreement.start(stop.reason, self.checkpointer is not None and self.checkpointer.writing)
            learning_rate = self.trainee.optimizer.param_groups[0]["lr"]
            with self.monitor.watch(step) as watched:
                result = train_step(self.config, self.trainee, self.watchdog.batches(self.batches))
            with self.reporter.paused():
                held_out = self.evaluation.losses(self.trainee, step=step)
            figures = self.reporter.step(
                step, result, learning_rate=learning_rate, held_out=held_out, watched=watched
            )
            if figures is not None:
                self.health.rates.append(figures["tokens_per_second"])
            reason, writing = self.agreement.result()
            if not writing:
                self._finish_save()
            try:
                self.health.judge(step, updated=result.updated, speak=dist.get_rank() == 0)
            except Diverged:
                self._finish_save()
                raise
            if (before := self._rewound(step, result)) is not None:
                step = before
                continue
            last = bool(reason) or step == _last_step(self.config)
            if self._saves(step, last=last):
                self._save(step, last=last)
        self._finish_save(last=True)
        self.reporter.close()
        return step, reason

    def _batches(self, first_step: int) -> Iterator[PlannedBatch]:
        return batches(
            self.config,
            self.windows,
            first_step=first_step,
            pin_memory=rank_device().type == "cuda",
            skipped=self.health.counts.skipped_batches,
        )

    def _rewound(self, step: int, result: StepResult) -> int | None:
        """The step gone back to where the loss of `step` is a spike (see `spikes.py`), else None."""
        why = self.spikes.judge(result)
        if why is None:
            return None
        assert self.checkpointer is not None, "a configuration with train.spike_factor has a folder"
        self._finish_save()
        self.watchdog.at("rewinding")
        latest = step - self.config.train.rewind_steps
        folder = newest_good(self.checkpointer.directory, latest=latest)
        if folder is None:
            _say(f"step {step}: {why}; going on, as there is no checkpoint of step {latest} or before")
            self.spikes.accept()
            return None
        self.health.spike(step, why, speak=dist.get_rank() == 0)
        before, state = load_checkpoint(self.config, self.trainee, folder)
        self.health.rewind(step, before)
        self.spikes.resume(state)
        self.checkpointer.go_back(before)
        self.saved, self.batches = before, self._batches(before)
        self.reporter.restart()
        _say(f"back to {folder}; the {step - before} global batches from there to the spike's are skipped")
        return before

    def _spread(self, results: list[StepResult]) -> dict[str, float]:
        waited = sum(result.data_wait for result in results) / len(results)
        totals = {f"total_{name}": count for name, count in self.health.state().items()}
        return spread(forward=self.forward.take(), waited=waited) | totals

    def _save(self, step: int, *, last: bool) -> None:
        assert self.checkpointer is not None, "only a run with a folder saves"
        self._finish_save()
        self.watchdog.at("saving")
        try:
            state = self.health.state() | self.spikes.state()
            self.checkpointer.save(self.trainee, step=step, state=state)
        except SaveFailed as failed:
            self._survive(failed, last=last)

    def _finish_save(self, *, last: bool = False) -> None:
        if self.checkpointer is None or not self.checkpointer.unfinished:
            return
        self.watchdog.at("finishing a checkpoint")
        try:
            self.checkpointer.finish()
            self.saved = self.checkpointer.saved
        except SaveFailed as failed:
            self._survive(failed, last=last)

    def _survive(self, failed: SaveFailed, *, last: bool) -> None:
        """A checkpoint that cannot be written costs nothing yet: the run goes on and tries at the next."""
        if last:
            raise failed
        self.health.counts.failed_saves += 1
        _say(f"could not save: {failed}\n    going on; make room before the next save (older ones are whole)")

    def _saves(self, step: int, *, last: bool) -> bool:
        if self.checkpointer is None:
            return False
        interval = self.config.checkpoint.save_interval
        return last or bool(interval and step % interval == 0)

    def _resume(self) -> int:
        """Steps already taken."""
        folder = newest_good(self.checkpointer.directory) if self.checkpointer is not None else None
        if folder is not None:
            step, state = load_checkpoint(self.config, self.trainee, folder)
            self.health.resume(state)
            self.spikes.resume(state)
            _say(f"resumed from {folder} after step {step}")
            return step
        if self.config.checkpoint.pretrained is not None:
            load_pretrained(self.trainee, self.config.checkpoint.pretrained)
            _say(f"took the weights of {self.config.checkpoint.pretrained}")
        return 0

    def _tell(self, step: int, reason: int) -> str:
        """Says how the run ended and how it fared, on the console and in outcome.json."""
        outcome = "finished" if step >= self.config.train.steps else "stopped"
        why = StopRequests.describe(reason) if reason else "the last step"
        summary = self.health.summary(self.checkpointer.stalls if self.checkpointer is not None else [])
        if dist.get_rank() == 0:
            write_outcome(self.config, {"outcome": outcome, "step": step, "reason": why, **summary})
        _say(f"{outcome} after step {step} ({why}): " + ", ".join(f"{k} {v}" for k, v in summary.items()))
        return outcome


def complete(config: Config) -> Config:
    """`config` with what the data set decides: the vocabulary's size where the model leaves it open."""
    if config.model.vocab_size is not None:
        return config
    vocab_size = Documents(data_sets(config.data.train)[0][0]).summary.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def _last_step(config: Config) -> int:
    return min(config.train.steps, config.train.stop_after or config.train.steps)


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
