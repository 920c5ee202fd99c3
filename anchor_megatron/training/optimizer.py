"""The optimizer (Megatron-Core's distributed AdamW) and the learning rate's course."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from anchor_megatron.config import Config

__all__ = ["build_optimizer", "build_scheduler", "create_optimizer_state"]


def build_optimizer(config: Config, model: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW with its state sharded over the data- and context-parallel ranks."""
    given = config.optimizer
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=given.lr,
            min_lr=given.min_lr,
            weight_decay=given.weight_decay,
            adam_beta1=given.beta1,
            adam_beta2=given.beta2,
            adam_eps=given.eps,
            clip_grad=given.clip_grad,
            bf16=config.train.precision == "bf16",
            params_dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
            use_distributed_optimizer=True,
            # with a scale, even 1, it looks for NaN and Inf and then skips the update, on all ranks
            loss_scale=1.0,
        ),
        [model],
    )


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The learning rate as a function of the step: linear warm-up, then constant, linear or cosine."""
    given, steps = config.optimizer, config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=given.lr,
        min_lr=given.min_lr,
        lr_warmup_steps=given.warmup_steps,
        lr_decay_steps=max(steps, given.warmup_steps + 1),
        lr_decay_style=given.decay,
        start_wd=given.weight_decay,
        end_wd=given.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # of a checkpoint it takes the steps alone
        override_opt_param_scheduler=True,
    )


def create_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter Adam's state before the first step, so that its shape is known to a checkpoint.

    torch's AdamW makes its state in the first step; Megatron-Core cannot save or load what is not there.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None or inner.state:
            continue
        if not isinstance(inner, torch.optim.AdamW):
            part._init_optimizer_states_with_dummy_values()
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = dict(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
