"""Batches of one rank, in order, from any step on. Workers pack and plan ahead of the training loop.

Micro-batch m of step s is a function of the configuration and (s, m) alone, so a loader that starts at step
500 gives what one that started at 0 gives there.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from anchor_megatron.config import Config
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.sampler import window_indices
from anchor_megatron.layout.cost import CostModel, LayerShape, Machine, read_machine
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.setup import micro_batches_per_step

__all__ = ["BatchDataset", "batches", "cost_model", "open_windows"]


def open_windows(config: Config) -> WindowDataset:
    """The training windows of `config.data`; ValueError naming the file or field that does not fit."""
    data = config.data
    documents = Documents(data.train, vocab_size=config.model.vocab_size)
    anchor = data.anchor_token if data.anchor_token is not None else documents.summary.anchor_token
    if config.model.vocab_size is not None and anchor >= config.model.vocab_size:
        raise ValueError(
            f"data.anchor_token: got {anchor}, expected an id below vocab_size = {config.model.vocab_size}"
        )
    return WindowDataset(
        documents,
        seq_length=data.seq_length,
        anchor_token=anchor,
        seed=config.train.seed,
        anchor_loss=data.anchor_loss,
    )


def cost_model(config: Config) -> CostModel:
    """What placements are judged by: `attention.calibration`'s rates and the heads of one rank."""
    attention, model = config.attention, config.model
    machine = Machine() if attention.calibration is None else read_machine(attention.calibration)
    shape = LayerShape(
        heads=model.num_attention_heads // config.parallel.tensor,
        groups=max(1, model.num_query_groups // config.parallel.tensor),
        head_dim=model.kv_channels or model.hidden_size // model.num_attention_heads,
        bytes_per_value=2 if config.train.precision == "bf16" else 4,
    )
    return CostModel(machine, shape, attention.ranks_per_node)


class BatchDataset(Dataset):
    """This rank's micro-batches; item i is micro-batch i % m of step i // m, m micro-batches a step."""

    def __init__(self, config: Config, windows: WindowDataset) -> None:
        self.config, self.windows = config, windows
        self.micro_batches = micro_batches_per_step(config)
        self.costs = cost_model(config)
        self.data_parallel = dict(
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
        self.context_parallel = dict(
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
        )

    def __len__(self) -> int:
        return self.config.train.steps * self.micro_batches

    def __getitem__(self, item: int) -> PlannedBatch:
        step, micro_batch = divmod(item, self.micro_batches)
        indices = window_indices(
            step,
            micro_batch,
            micro_batch_size=self.config.train.micro_batch_size,
            global_batch_size=self.config.train.global_batch_size,
            **self.data_parallel,
        )
        return plan_batch(
            [self.windows[int(n)] for n in indices],
            mode=self.config.data.mode,
            placement=self.config.attention.placement,
            costs=self.costs,
            **self.context_parallel,
        )


def batches(
    config: Config, windows: WindowDataset, *, first_step: int, pin_memory: bool
) -> Iterator[PlannedBatch]:
    """This rank's batches from `first_step` on, planned ahead by `data.num_workers` processes."""
    dataset = BatchDataset(config, windows)
    workers = config.data.num_workers
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first_step * dataset.micro_batches, len(dataset)),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
        )
    )
