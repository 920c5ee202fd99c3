"""A loss far above those before it, and the way back to before it.

    train.spike_factor: 2, train.spike_window: 64; a checkpoint after every 10 steps

    step                1 .. 10 | 11 .. 26     10   11   12 ..
    global batch        1 .. 10 | 11 .. 26          27   28 ..
                                         loss 7.1, over 2 times the median 2.9: back to step 10, 16 skipped

Step s takes global batch s + `skipped_batches`, which grows by the steps gone back: no window is seen twice
and none that led to the spike again. The losses judged by and the counts travel in the checkpoint, so that a
run killed at any point behind a rewind comes to the same spike, the same checkpoint and the same batches once
more. What is judged is the mean loss of all ranks' tokens, so that all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from anchor_megatron.config import Config
from anchor_megatron.training.step import StepResult

__all__ = ["Spikes", "global_loss"]


class Spikes:
    """Judges the loss of every step by the median of the last `train.spike_window`."""

    def __init__(self, config: Config) -> None:
        self.factor = config.train.spike_factor
        self.losses: deque[float] = deque(maxlen=config.train.spike_window)

    def judge(self, result: StepResult) -> str | None:
        """What is wrong with the loss of the step just taken, None where nothing is. All ranks call it.

        The first `train.spike_window` steps are none, nor is one that was skipped (see `health.py`). One that
        is a spike is not kept to judge by: `accept` does that.
        """
        if self.factor is None:
            return None
        loss = global_loss(result)  # one small all-reduce a step
        if not (result.updated and math.isfinite(loss)):
            return None
        full = len(self.losses) == self.losses.maxlen
        median = statistics.median(self.losses) if full else math.inf
        if loss > self.factor * median:
            self._last = loss
            return (
                f"loss {loss:.4f} is over {self.factor:g} times the median {median:.4f} of {len(self.losses)}"
            )
        self.losses.append(loss)
        return None

    def accept(self) -> None:
        """Takes the last spike for what losses are like now, where the run goes on with it."""
        self.losses.append(self._last)

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses)}

    def resume(self, state: dict[str, Any]) -> None:
        """Judges by the losses that a checkpoint kept."""
        self.losses.clear()
        self.losses.extend(map(float, state.get("losses", ())))


def global_loss(result: StepResult) -> float:
    """The step's mean loss over the tokens of all ranks (one all-reduce over the world)."""
    # tensor-parallel ranks hold the same sums, earlier pipeline stages zeros
    total = result.loss.double() * (parallel_state.get_tensor_model_parallel_rank() == 0)
    dist.all_reduce(total)
    loss, tokens = total.tolist()
    return loss / max(tokens, 1.0)
