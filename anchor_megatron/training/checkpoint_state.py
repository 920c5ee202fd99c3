"""What a checkpoint holds: model, optimizer, schedule, random generators, the position in the data.

Tensors go in as Megatron-Core's sharded ones, cut as this layout has them and loadable at any; the
generators' states belong to one layout and are left out at another.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from anchor_megatron.config import Config, DataConfig, read_sections
from anchor_megatron.training.optimizer import create_optimizer_state
from anchor_megatron.training.step import Trainee

__all__ = [
    "data_position",
    "generators",
    "model_state",
    "restore_generators",
    "sharded_state",
    "warn_of_other_data",
]

_log = logging.getLogger(__name__)

_WINDOW_FIELDS = {  # decide which tokens are in window n
    "data": tuple(one.name for one in fields(DataConfig) if one.name != "num_workers"),
    "train": ("seed", "global_batch_size"),
}


def model_state(trainee: Trainee) -> dict[str, Any]:
    """The model's sharded state alone."""
    return trainee.gpt.sharded_state_dict(metadata=_metadata())


def sharded_state(trainee: Trainee, *, loading: bool) -> dict[str, Any]:
    """Model, optimizer and schedule."""
    create_optimizer_state(trainee.optimizer)
    model = model_state(trainee)
    optimizer = trainee.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_metadata())
    return {"model": model, "optimizer": optimizer, "scheduler": trainee.scheduler.state_dict()}


def data_position(config: Config, step: int, skipped_batches: int) -> dict[str, int]:
    """Where the data stands after `step` steps: the number of the next window of the shuffled sequence."""
    return {"next_window": (step + skipped_batches) * config.train.global_batch_size}


def generators() -> dict[str, ShardedTensor]:
    """The states of this rank's random generators, one row of a tensor [ranks, bytes]."""
    row = torch.cat(_generator_states())[None]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {"generators": ShardedTensor.from_rank_offsets("generators", row, (0, rank, world_size))}


def restore_generators(config: Config, folder: Path) -> None:
    """Puts the random generators where they stood; at another layout they keep the run's own seeds."""
    saved = dist_checkpointing.load_tensors_metadata(str(folder)).get("generators")
    expected = generators()
    file = folder / "config.yaml"
    layout = read_sections(file).get("parallel") if file.is_file() else None
    if saved is None or layout != vars(config.parallel):
        return
    if tuple(saved.global_shape) != tuple(expected["generators"].global_shape):
        return
    row = dist_checkpointing.load(expected, str(folder))["generators"][0].cpu()
    sizes = [state.numel() for state in _generator_states()]
    parts = [part.clone() for part in row.split(sizes)]  # torch takes a state for the whole of its storage
    torch.set_rng_state(parts[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(parts[1])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    names = sorted(tracker.get_states())
    tracker.set_states(dict(zip(names, parts[-len(names) :], strict=True)) if names else {})


def warn_of_other_data(config: Config, folder: Path) -> None:
    """A warning for each field that makes the run go on with other windows than the checkpoint's would
    have.
    """
    file = folder / "config.yaml"
    if dist.get_rank() or not file.is_file():
        return
    saved = read_sections(file)
    for section, names in _WINDOW_FIELDS.items():
        for name in names:
            got, before = getattr(getattr(config, section), name), saved.get(section, {}).get(name)
            if got != before:
                _log.warning(
                    "%s.%s: got %r, checkpoint %s has %r: the data does not go on where it stood",
                    section, name, got, folder, before,
                )  # fmt: skip


def _generator_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return states + [tracked[name] for name in sorted(tracked)]


def _metadata() -> dict[str, Any]:
    """What makes Megatron-Core write the optimizer in a form that any TP, PP, CP and DP can read."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
