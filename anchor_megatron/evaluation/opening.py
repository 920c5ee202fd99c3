"""A checkpoint on disk, training's or Hugging Face's, as a model in memory with its tokenizer.

A Hugging Face folder is converted into a temporary one first, by the first rank, and read from there; each
rank then loads its share, at whatever tensor- and context-parallel sizes the evaluation runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from anchor_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig, check_config
from anchor_megatron.convert.exporting import checkpoint_folder, read_checkpoint_model
from anchor_megatron.convert.importing import import_checkpoint
from anchor_megatron.data.tokenizer import load_tokenizer
from anchor_megatron.evaluation.reader import Reader
from anchor_megatron.model.builder import build_model
from anchor_megatron.training.checkpoint_fit import check_fit
from anchor_megatron.training.setup import initialize_ranks

__all__ = ["Opened", "opened"]


@dataclass(frozen=True)
class Opened:
    """A model ready to read, the shape it has, and its tokenizer."""

    reader: Reader
    model: ModelConfig
    tokenizer: Any


@contextmanager
def opened(
    path: Path, *, parallel: ParallelConfig, precision: str, tokenizer: Path | None = None
) -> Iterator[Opened]:
    """The model in `path`: a training checkpoint, a folder of them (the newest), or a Hugging Face folder.

    tokenizer: a folder to take it from instead of the checkpoint's own. All ranks call it together. Raises
    ValueError naming what is missing or does not fit.
    """
    with _as_checkpoint(path, parallel) as step:
        model, _ = read_checkpoint_model(step)
        config = _config(model, parallel, precision)
        if not parallel_state.model_parallel_is_initialized():
            initialize_ranks(config)
        gpt = build_model(config).eval()
        check_fit(gpt, step)
        state = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(step))
        gpt.load_state_dict(state["model"])
        found = load_tokenizer(
            tokenizer or (path if (path / "config.json").is_file() else step / "tokenizer")
        )
    yield Opened(Reader(gpt), model, found)


def _config(model: ModelConfig, parallel: ParallelConfig, precision: str) -> Config:
    config = Config(model=model, parallel=parallel, train=TrainConfig(precision=precision))
    config.data.seq_length = model.max_position_embeddings or config.data.seq_length
    # contexts of any length are read: the ranks need not divide this one, which training may have used
    config.data.seq_length += -config.data.seq_length % parallel.context
    check_config(config)
    return config


@contextmanager
def _as_checkpoint(path: Path, parallel: ParallelConfig) -> Iterator[Path]:
    """`path` as a training checkpoint's folder, for as long as it is needed."""
    if not (path / "config.json").is_file():
        yield checkpoint_folder(path)
        return
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    with tempfile.TemporaryDirectory(prefix="evaluate-") as name:
        # every rank sees the first rank's folder: ranks of other machines would need it on a shared disk
        names = [name]
        if not alone:
            dist.broadcast_object_list(names)
        folder = Path(names[0]) / "checkpoint"
        problem: list[str | None] = [None]
        if alone or dist.get_rank() == 0:
            try:
                import_checkpoint(path, folder, say=lambda message: None)
            except (ValueError, OSError) as error:
                problem = [str(error)]
        if not alone:
            dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(f"{path}: {problem[0]}")
        yield checkpoint_folder(folder)
        if not alone:
            dist.barrier()
