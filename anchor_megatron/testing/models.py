"""Small models and windows for tests and benches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from anchor_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from anchor_megatron.data.window import Window, WindowCounts
from anchor_megatron.model.builder import rank_device
from anchor_megatron.training.batch import Batch, plan_batch

__all__ = ["ANCHOR", "batch_of", "random_window", "tiny_config"]

ANCHOR = 1


def tiny_config(*, seq_length: int = 64, vocab_size: int = 90, **sections: dict[str, Any]) -> Config:
    """Two layers of width 64 in fp32. `sections` override fields: parallel=dict(tensor=2)."""
    config = Config(
        model=ModelConfig(vocab_size=vocab_size),
        parallel=ParallelConfig(),
        train=TrainConfig(precision="fp32"),
    )
    config.data.train, config.data.seq_length = "unused", seq_length
    for name, values in sections.items():
        setattr(config, name, dataclasses.replace(getattr(config, name), **values))
    return config


def random_window(*, lengths: list[int], vocab_size: int, seed: int) -> Window:
    """A window of documents of random tokens; `lengths` include their anchors."""
    generator = np.random.default_rng(seed)
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int64)
    tokens = generator.integers(ANCHOR + 1, vocab_size, cu_seqlens[-1])
    tokens[cu_seqlens[:-1]] = ANCHOR
    loss_mask = np.ones(tokens.size, dtype=bool)
    loss_mask[cu_seqlens[:-1]] = loss_mask[cu_seqlens[1:] - 1] = False
    labels = np.where(loss_mask, np.roll(tokens, -1), 0)
    documents = np.arange(len(lengths))
    counts = WindowCounts(tokens=tokens.size - len(lengths), pieces=len(lengths))
    return Window(tokens, labels, loss_mask, cu_seqlens, documents, np.zeros_like(documents), counts)


def batch_of(
    windows: list[Window], config: Config, *, context_parallel_rank: int
) -> tuple[Batch, np.ndarray]:
    """This rank's batch on its device, and the micro-batch token of each of its rows."""
    planned = plan_batch(
        windows,
        mode=config.data.mode,
        placement=config.attention.placement,
        exchange=config.attention.exchange,
        ring_rows=config.attention.ring_rows,
        context_parallel_size=config.parallel.context,
        context_parallel_rank=context_parallel_rank,
    )
    return planned.to(rank_device()), planned.plan.token_index
