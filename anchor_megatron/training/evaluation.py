"""Losses on documents that are not trained on.

`valid_loss` every `train.eval_interval` steps, on the first windows of data.split's second share; `test_loss`
on those of the third, after the run's last step. The windows are the same each time, in plain packing and in
the run's mode, and each loss is a mean over their counted tokens.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from anchor_megatron.config import Config
from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.model.builder import rank_device
from anchor_megatron.training.loader import batches, open_windows
from anchor_megatron.training.step import Trainee, forward_backward

__all__ = ["HELD_OUT", "Evaluation"]

HELD_OUT = ("valid_loss", "test_loss")


class Evaluation:
    """What a run evaluates, and when. Raises ValueError for splits without documents."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        train, data = config.train, config.data
        self.last_step, self.interval = train.steps, train.eval_interval
        held_out = dataclasses.replace(
            data, sampler="plain", packing="plain", num_workers=min(data.num_workers, 1)
        )
        self.config = dataclasses.replace(
            config, data=held_out, train=dataclasses.replace(train, steps=train.eval_steps)
        )
        self.valid = self._open("valid", corpus) if train.eval_interval else None
        self.test = self._open("test", corpus) if data.split[2] else None

    def _open(self, split: str, corpus: Corpus) -> WindowDataset:
        return open_windows(self.config, split, corpus=corpus)

    def losses(self, trainee: Trainee, *, step: int) -> dict[str, float]:
        """What is due after `step` (1 is the first), by the names of HELD_OUT. All ranks call it together."""
        due = {}
        if self.valid is not None and (step % self.interval == 0 or step == self.last_step):
            due["valid_loss"] = self.valid
        if self.test is not None and step == self.last_step:
            due["test_loss"] = self.test
        return {name: self._loss(trainee, windows) for name, windows in due.items()}

    def _loss(self, trainee: Trainee, windows: WindowDataset) -> float:
        found = batches(self.config, windows, first_step=0, pin_memory=rank_device().type == "cuda")
        total = torch.zeros(2, device=rank_device(), dtype=torch.float64)
        for _ in range(self.config.train.steps):
            total += forward_backward(self.config, trainee.model, found, forward_only=True)[0]
        # tensor-parallel ranks hold the same sums, earlier pipeline stages zeros
        total *= parallel_state.get_tensor_model_parallel_rank() == 0
        dist.all_reduce(total)
        loss, tokens = total.tolist()
        return loss / max(tokens, 1.0)
