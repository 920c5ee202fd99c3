"""Batches of one rank, in order, from any step on. Workers pack and plan ahead of the training loop.

Micro-batch m of step s is a function of the configuration and (s, m) alone, so a loader that starts at step
500 gives what one that started at 0 gives there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from anchor_megatron.config import Config, data_sets
from anchor_megatron.data.assemble import Labels
from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.documents import Documents, tokenizer_folder
from anchor_megatron.data.packing import Packing, WindowDataset
from anchor_megatron.data.recipe import Recipe, make_groups
from anchor_megatron.data.sampler import window_indices
from anchor_megatron.data.tokenizer import load_tokenizer
from anchor_megatron.data.window import Window
from anchor_megatron.layout.cost import CostModel, LayerShape, Machine, read_machine
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.setup import micro_batches_per_step
from anchor_megatron.training.signals import outlive_signals

__all__ = ["BatchDataset", "batches", "cost_model", "open_windows"]


def open_windows(config: Config, split: str = "train", *, corpus: Corpus | None = None) -> WindowDataset:
    """The windows of `config.data`, of the documents in `split`; `corpus` where it is open already.

    ValueError naming the file or field that does not fit.
    """
    data, vocab_size = config.data, config.model.vocab_size
    sets = data_sets(data.train)
    if corpus is None:
        corpus = Corpus([Documents(prefix, vocab_size=vocab_size) for prefix, _ in sets])
    anchor = data.anchor_token if data.anchor_token is not None else corpus.summary.anchor_token
    end = _end_token(config, corpus) if data.end_label == "eos" else None
    tags = _tags(corpus) if data.domain_tag else None
    largest_tag = None if tags is None else max(map(max, tags))
    for name, token in (("anchor_token", anchor), ("eos_token", end), ("domain_tag", largest_tag)):
        if token is not None and vocab_size is not None and token >= vocab_size:
            raise ValueError(f"data.{name}: got {token}, expected an id below vocab_size = {vocab_size}")
    groups = make_groups(
        corpus,
        weights=[weight for _, weight in sets],
        splits=data.split,
        split=split,
        sampler=data.sampler,
        long_tokens=data.long_tokens,
        long_weight=data.long_weight,
    )
    return WindowDataset(
        corpus,
        seq_length=data.seq_length,
        anchor_token=anchor,
        seed=config.train.seed,
        labels=Labels(anchor_loss=data.anchor_loss, end_token=end),
        packing=_packing(config),
        tags=tags,
        recipe=Recipe(groups, seed=config.train.seed),
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


def _packing(config: Config) -> Packing:
    data = config.data
    return Packing(
        kind=data.packing,
        lookahead=data.packing_lookahead,
        batch_windows=config.train.global_batch_size,
        shuffle=config.data.shuffle_windows,
        most_units=data.max_documents,
        shortest=data.min_document_tokens,
        join_short=data.short_documents == "join",
        interleave=data.interleave,
    )


def _end_token(config: Config, corpus: Corpus) -> int:
    if config.data.eos_token is not None:
        return config.data.eos_token
    folder = tokenizer_folder(corpus.sets[0].prefix)
    found = load_tokenizer(folder).eos_token_id
    if found is None:
        raise ValueError(f"data.eos_token: tokenizer {folder} has no EOS, expected the id of a token")
    return int(found)


def _tags(corpus: Corpus) -> list[list[int]]:
    """Tokens of every source's tag: its name and the end of a line."""
    tokenizer = load_tokenizer(tokenizer_folder(corpus.sets[0].prefix))
    texts = [f"{name}\n" for name in corpus.source_names]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


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

    def windows_of(self, item: int) -> list[Window]:
        """The windows of a micro-batch, which all context-parallel ranks share."""
        step, micro_batch = divmod(item, self.micro_batches)
        indices = window_indices(
            step,
            micro_batch,
            micro_batch_size=self.config.train.micro_batch_size,
            global_batch_size=self.config.train.global_batch_size,
            **self.data_parallel,
        )
        return [self.windows[int(n)] for n in indices]

    def __getitem__(self, item: int) -> PlannedBatch:
        return plan_batch(
            self.windows_of(item),
            mode=self.config.data.mode,
            placement=self.config.attention.placement,
            costs=self.costs,
            exchange=self.config.attention.exchange,
            ring_rows=self.config.attention.ring_rows,
            **self.context_parallel,
        )


def batches(
    config: Config, windows: WindowDataset, *, first_step: int, pin_memory: bool, skipped: int = 0
) -> Iterator[PlannedBatch]:
    """This rank's batches of steps `first_step` (0 is the first) to the last, planned ahead by
    `data.num_workers` processes. skipped: global batches left out before, so that step s takes s + skipped.
    """
    dataset = BatchDataset(config, windows)
    workers = config.data.num_workers
    # Workers share the epoch's order, gigabytes where there are 100 million documents, and begin at
    # once, as they are forked (a process may have another way to start others)
    first = first_step + skipped
    windows.locate(first * config.train.global_batch_size)
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first * dataset.micro_batches, len(dataset) + skipped * dataset.micro_batches),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # else a resumed run's loader would draw from the model's generator
        )
    )
