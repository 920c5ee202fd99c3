"""One optimizer step: micro-batches through Megatron-Core's schedule, gradients over global tokens, clip,
update.

The loss is a sum over tokens. Every rank reports the sum and the number of tokens it counted; gradients are
summed over ranks and divided by the global number once, so a rank whose tokens are all masked adds nothing
and breaks nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor

from anchor_megatron.config import Config
from anchor_megatron.model.builder import build_model, rank_device
from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.model.gpt import AnchorGPT
from anchor_megatron.training.batch import BatchStats, PlannedBatch
from anchor_megatron.training.optimizer import build_optimizer, build_scheduler
from anchor_megatron.training.setup import micro_batches_per_step

__all__ = [
    "StepResult",
    "Trainee",
    "build_model_in_ddp",
    "build_trainee",
    "finalize_gradients",
    "forward_backward",
    "forward_step",
    "train_step",
]


@dataclass
class Trainee:
    """What a step changes. `gpt` is the bare model inside `model`, which wraps it for training."""

    model: DistributedDataParallel
    gpt: AnchorGPT
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


@dataclass(frozen=True)
class StepResult:
    """This rank's part of a step. `loss` fp32 [2]: summed loss and counted tokens (zeros but on the last
    stage).
    """

    loss: Tensor
    stats: list[BatchStats] = field(default_factory=list)
    grad_norm: float = 0.0
    updated: bool = True
    data_wait: float = 0.0  # seconds in which the step had nothing to do but wait for a planned batch


def build_trainee(config: Config) -> Trainee:
    """The model of this rank, wrapped for training, with its optimizer and schedule."""
    model, gpt = build_model_in_ddp(config)
    model.broadcast_params()
    optimizer = build_optimizer(config, model)
    gpt.config.grad_scale_func = optimizer.scale_loss
    return Trainee(model, gpt, optimizer, build_scheduler(config, optimizer))


def build_model_in_ddp(config: Config) -> tuple[DistributedDataParallel, AnchorGPT]:
    """The model of this rank inside Megatron-Core's DistributedDataParallel, and bare."""
    gpt = build_model(config)
    wrapped: Any = Float16Module(gpt.config, gpt) if config.train.precision == "bf16" else gpt
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=torch.cuda.is_available(),
        check_for_nan_in_grad=False,  # the optimizer looks at the norm, once, after the reduction
    )
    model = DistributedDataParallel(gpt.config, ddp, wrapped)
    gpt.config.finalize_model_grads_func = finalize_gradients
    gpt.config.no_sync_func = model.no_sync
    return model, gpt


def train_step(config: Config, trainee: Trainee, batches: Iterator[PlannedBatch]) -> StepResult:
    """Takes one step's micro-batches from `batches` and updates the model. All ranks call it together."""
    trainee.model.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    timed = _TimedBatches(batches)
    loss, stats = forward_backward(config, trainee.model, timed)
    updated, grad_norm, _ = trainee.optimizer.step()  # nothing is updated where a gradient is not finite
    if updated:
        trainee.scheduler.step(increment=1)
    norm = math.nan if grad_norm is None else float(grad_norm)
    return StepResult(loss, stats, norm, bool(updated), timed.waited)


class _TimedBatches(Iterator[PlannedBatch]):
    """`batches`, and the seconds that were waited for them."""

    def __init__(self, batches: Iterator[PlannedBatch]) -> None:
        self.batches, self.waited = batches, 0.0

    def __next__(self) -> PlannedBatch:
        started = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - started
        return batch


def forward_backward(
    config: Config,
    model: DistributedDataParallel,
    batches: Iterator[PlannedBatch],
    *,
    forward_only: bool = False,
) -> tuple[Tensor, list[BatchStats]]:
    """Loss (as in `StepResult`) and figures of one step's micro-batches; gradients are left in the model's
    buffers.
    """
    stats: list[BatchStats] = []
    tokens = config.data.seq_length * config.train.micro_batch_size
    reported = get_forward_backward_func()(
        forward_step_func=partial(forward_step, stats),
        data_iterator=batches,
        model=[model],
        num_microbatches=micro_batches_per_step(config),
        seq_length=tokens,
        micro_batch_size=1,  # windows of a micro-batch lie one after another in one sequence
        decoder_seq_length=tokens,
        forward_only=forward_only,
    )
    if not reported:  # not the last pipeline stage
        return torch.zeros(2, device=rank_device()), stats
    return torch.stack(reported).sum(dim=0), stats


def forward_step(stats: list[BatchStats], batches: Iterator[PlannedBatch], model: Any) -> tuple[Tensor, Any]:
    planned = next(batches)
    stats.append(planned.stats)
    batch = planned.to(rank_device())
    config = get_model_config(model)
    loss = model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=PlannedSeqParams(plan=batch.plan),
        # copies of the anchor are kept out of the experts' statistics
        padding_mask=batch.anchors if config.num_moe_experts is not None else None,
    )
    return loss, partial(_report_loss, batch.loss_mask)


def _report_loss(loss_mask: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron-Core's schedules take where the loss is per token: the sum, the tokens counted, the
    report.
    """
    count = loss_mask.sum()
    # an infinite loss can have finite gradients: make them NaN, so that the optimizer refuses the step
    total = total * torch.where(total.detach().isfinite(), 1.0, math.nan)
    return total, count.to(torch.int), torch.stack((total.detach(), count))


def finalize_gradients(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron-Core's reductions, then the division by the step's tokens, done without asking the device for
    the number.
    """
    finalize_model_grads(model, None, **kwargs)
    assert num_tokens is not None, "the loss is summed over tokens, so their number has to arrive here"
    dist.broadcast(
        num_tokens,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in model:
        chunk.scale_gradients(num_tokens.clamp(min=1).float().reciprocal())
