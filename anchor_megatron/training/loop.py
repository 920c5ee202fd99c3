"""The run: set up, resume where there is something to resume from, step, report, save."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist

from anchor_megatron.config import Config
from anchor_megatron.data.corpus import parse_sets
from anchor_megatron.data.documents import Documents
from anchor_megatron.model.builder import rank_device
from anchor_megatron.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
)
from anchor_megatron.training.evaluation import Evaluation
from anchor_megatron.training.loader import batches, open_windows
from anchor_megatron.training.monitor import Monitor
from anchor_megatron.training.report import Reporter
from anchor_megatron.training.setup import initialize_ranks
from anchor_megatron.training.step import Trainee, build_trainee, train_step

__all__ = ["Run", "complete"]


class Run:
    """A run that is ready to step: everything a user can get wrong has been looked at.

    Resumes from the newest checkpoint in `checkpoint.directory` where there is one. Raises ValueError for a
    configuration, data set or checkpoint that does not fit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config = complete(config)
        windows = open_windows(config)
        self.evaluation = Evaluation(config)
        initialize_ranks(config)
        self.trainee = build_trainee(config)
        self.first_step = _start(config, self.trainee)
        self.batches = batches(
            config, windows, first_step=self.first_step, pin_memory=rank_device().type == "cuda"
        )
        self.reporter = Reporter(config)
        self.monitor = Monitor(config, self.trainee.gpt)

    def train(self) -> None:
        """Steps to `train.steps`, reporting and saving on the way. All ranks call it together."""
        for step in range(self.first_step + 1, _last_step(self.config) + 1):
            learning_rate = self.trainee.optimizer.param_groups[0]["lr"]
            with self.monitor.watch(step) as watched:
                result = train_step(self.config, self.trainee, self.batches)
            with self.reporter.paused():
                held_out = self.evaluation.losses(self.trainee, step=step)
            self.reporter.step(step, result, learning_rate=learning_rate, held_out=held_out, watched=watched)
            if _saves(self.config, step):
                _say(f"saved {save_checkpoint(self.config, self.trainee, step=step)}")
        self.reporter.close()


def complete(config: Config) -> Config:
    """`config` with what the data set decides: the vocabulary's size where the model leaves it open."""
    if config.model.vocab_size is not None:
        return config
    vocab_size = Documents(parse_sets(config.data.train)[0][0]).summary.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def _start(config: Config, trainee: Trainee) -> int:
    """Steps already taken."""
    directory = config.checkpoint.directory
    newest = latest_checkpoint(Path(directory)) if directory is not None else None
    if newest is not None:
        step = load_checkpoint(trainee, newest)
        _say(f"resumed from {newest} after step {step}")
        return step
    if config.checkpoint.pretrained is not None:
        load_pretrained(trainee, config.checkpoint.pretrained)
        _say(f"took the weights of {config.checkpoint.pretrained}")
    return 0


def _saves(config: Config, step: int) -> bool:
    if config.checkpoint.directory is None:
        return False
    interval = config.checkpoint.save_interval
    return step == _last_step(config) or bool(interval and step % interval == 0)


def _last_step(config: Config) -> int:
    return min(config.train.steps, config.train.stop_after or config.train.steps)


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
