"""Brings the ranks up: device, process groups, seeds."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from anchor_megatron.config import Config, data_parallel_size
from anchor_megatron.model.builder import rank_device

__all__ = ["initialize_ranks", "micro_batches_per_step"]


def initialize_ranks(config: Config) -> None:
    """Joins the process group that `torchrun` describes (a lone process is a group of one) and divides its
    ranks.

    ValueError where the number of ranks does not fit the configuration.
    """
    joined = dist.is_initialized()
    data_parallel_size(config, dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1")))
    if not joined:
        _join(config)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        expert_model_parallel_size=config.parallel.expert,
        # else the exchange's few blocks wait behind all those of the attention kernel it should hide under
        high_priority_stream_groups=["cp"] if torch.cuda.is_available() else None,
    )
    # every pipeline stage its own weights; tensor- and context-parallel ranks share the seed
    seed = config.train.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def micro_batches_per_step(config: Config) -> int:
    """Micro-batches that each model replica runs in one optimizer step."""
    replicas = parallel_state.get_data_parallel_world_size()
    return config.train.global_batch_size // (config.train.micro_batch_size * replicas)


def _join(config: Config) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(minutes=config.train.distributed_timeout_minutes)
    store: dist.Store = dist.HashStore()
    rank, world_size = 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun keeps the store of a job that it restarts, with the addresses of ranks that are gone
            # (of several machines each counts restarts by itself: the README says what to set there)
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout,
        device_id=rank_device() if on_gpu and "RANK" in os.environ else None,
    )  # fmt: skip
