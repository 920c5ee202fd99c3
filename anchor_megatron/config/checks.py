"""What a configuration must satisfy to run, each refusal naming the field.

check_config(config)                looks at the configuration alone
data_parallel_size(config, 8)       holds it against the number of ranks
"""

from __future__ import annotations

import logging
from operator import attrgetter

from anchor_megatron.config.data_sets import data_sets
from anchor_megatron.config.fields import Config

__all__ = ["check_config", "data_parallel_size"]

_log = logging.getLogger(__name__)

_CHOICES = {
    "data.mode": ("full", "document", "document_reset", "anchor"),
    "data.sampler": ("plain", "upsample_long"),
    "data.end_label": ("masked", "eos"),
    "data.short_documents": ("drop", "join"),
    "data.packing": ("plain", "best_fit", "balanced"),
    "attention.placement": ("document", "zigzag", "contiguous"),
    "attention.exchange": ("sparse", "direct", "ring", "ulysses"),
    "optimizer.decay": ("constant", "linear", "cosine"),
    "train.precision": ("bf16", "fp32"),
    "train.fp8": (None, "hybrid", "e4m3"),
    "train.fp8_recipe": ("delayed", "tensorwise", "blockwise"),
    "train.recompute": ("none", "selective", "full"),
}
_AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "model.num_experts",
    "model.moe_topk",
    "data.seq_length",
    "data.long_tokens",
    "data.max_documents",
    "data.packing_lookahead",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "attention.ranks_per_node",
    "train.steps",
    "train.stop_after",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.eval_steps",
    "train.max_bad_steps",
    "train.spike_window",
    "train.rewind_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "log.interval",
)
_AT_LEAST_ZERO = (
    "data.num_workers",
    "data.eos_token",
    "data.interleave",
    "data.min_document_tokens",
    "train.eval_interval",
    "optimizer.warmup_steps",
    "optimizer.clip_grad",
    "train.seed",
    "train.max_minutes",
    "train.max_rewinds",
    "train.distributed_timeout_minutes",
    "checkpoint.save_interval",
    "log.precision_interval",
)


def check_config(config: Config) -> None:
    """Raises ValueError, naming the field, for a value out of range and sizes that do not divide."""
    for name, choices in _CHOICES.items():
        got = attrgetter(name)(config)
        if got not in choices:
            raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(str, choices))}")
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            got = attrgetter(name)(config)
            if got is not None and got < least:
                raise ValueError(f"{name}: got {got}, expected at least {least}")
    _check_model(config)
    for layer in config.log.precision_layers or ():
        if not 0 <= layer < config.model.num_layers:
            last = config.model.num_layers - 1
            raise ValueError(f"log.precision_layers: got {layer}, expected layers from 0 to {last}")
    _check_tokens(config)
    _check_data(config)
    _check_rewinding(config)


def _check_model(config: Config) -> None:
    """The model's sizes against each other and against the ranks that share it."""
    model, parallel = config.model, config.parallel
    _divides(config, "model.num_attention_heads", "model.num_query_groups")
    if model.kv_channels is None:
        _divides(config, "model.hidden_size", "model.num_attention_heads")
    _divides(config, "model.num_attention_heads", "parallel.tensor")
    if config.attention.exchange == "ulysses":
        heads = model.num_attention_heads // parallel.tensor
        _expect_multiple("query heads of a tensor-parallel rank", heads, "parallel.context", parallel.context)
    _divides(config, "model.ffn_hidden_size", "parallel.tensor")
    _divides(config, "model.num_layers", "parallel.pipeline")
    if model.num_experts is not None:
        _divides(config, "model.num_experts", "parallel.expert")
        if parallel.tensor > 1 and not parallel.sequence:  # Megatron-Core's routers ask for it
            raise ValueError("parallel.sequence: got false, expected true for experts with tensor > 1")
    elif parallel.expert > 1:
        raise ValueError(f"parallel.expert: got {parallel.expert} for a model without experts, expected 1")


def _check_tokens(config: Config) -> None:
    """Every context-parallel rank holds equally many tokens, and so does every sequence-parallel one."""
    tokens, what = config.data.seq_length, "data.seq_length"
    if config.attention.placement == "document":  # it places the windows of a micro-batch together
        tokens, what = tokens * config.train.micro_batch_size, f"{what} * train.micro_batch_size"
    context, tensor = config.parallel.context, config.parallel.tensor
    _expect_multiple(what, tokens, "parallel.context", context)
    near = min(config.attention.ranks_per_node or context, context)
    _expect_multiple("parallel.context", context, "attention.ranks_per_node", near)
    whose = "tokens of a context-parallel rank"
    rows = config.data.seq_length * config.train.micro_batch_size // context
    if config.parallel.sequence:
        _expect_multiple(whose, rows, "parallel.tensor", tensor)
    if config.train.fp8 is not None:
        if config.train.precision != "bf16":
            raise ValueError(f"train.precision: got {config.train.precision}, expected bf16 with train.fp8")
        _expect_multiple(whose, rows, "16 (for train.fp8)", 16)


def _check_data(config: Config) -> None:
    """Splits and samplers; warns of data fields that the rest of the configuration makes idle."""
    data, train, split = config.data, config.train, config.data.split
    data_sets(data.train)
    if len(split) != 3 or min(split) < 0 or not split[0] or abs(sum(split) - 1) > 1e-6:
        raise ValueError(f"data.split: got {split}, expected three shares (train, valid, test) that sum to 1")
    if train.eval_interval and not split[1]:
        raise ValueError(
            f"train.eval_interval: got {train.eval_interval} without validation documents, expected 0 or a "
            "second share in data.split"
        )
    if data.long_weight <= 0:
        raise ValueError(f"data.long_weight: got {data.long_weight}, expected a number above 0")
    if data.interleave and data.mode == "document_reset":
        _log.warning(
            "data.interleave: positions of document_reset start in each document, so it changes nothing"
        )
    if data.short_documents == "join" and not data.min_document_tokens:
        _log.warning("data.short_documents: join is ignored, as data.min_document_tokens is 0")
    if data.eos_token is not None and data.end_label != "eos":
        _log.warning("data.eos_token: ignored, as data.end_label is %s", data.end_label)


def _check_rewinding(config: Config) -> None:
    """A rewind needs a spike that is one, and a checkpoint to go back to."""
    factor, kept = config.train.spike_factor, config.checkpoint
    if factor is None:
        return
    if factor <= 1:
        raise ValueError(f"train.spike_factor: got {factor}, expected a number above 1, or null")
    if kept.directory is None or not kept.save_interval:
        raise ValueError(
            f"train.spike_factor: got {factor} with checkpoint.directory {kept.directory} and save_interval "
            f"{kept.save_interval}, expected a folder and an interval: a rewind needs a checkpoint"
        )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Model replicas among `world_size` ranks; ValueError where the sizes do not fit."""
    parallel, train = config.parallel, config.train
    replica = parallel.tensor * parallel.pipeline * parallel.context
    _expect_multiple("number of ranks", world_size, "parallel.tensor * pipeline * context", replica)
    # experts are spread over data- and context-parallel ranks
    experts = parallel.tensor * parallel.pipeline * parallel.expert
    _expect_multiple("number of ranks", world_size, "parallel.tensor * pipeline * expert", experts)
    replicas = world_size // replica
    windows, by = train.micro_batch_size * replicas, "train.micro_batch_size * data-parallel size"
    _expect_multiple("train.global_batch_size", train.global_batch_size, by, windows)
    return replicas


def _divides(config: Config, name: str, divisor: str) -> None:
    _expect_multiple(name, attrgetter(name)(config), divisor, attrgetter(divisor)(config))


def _expect_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}: got {value}, expected a multiple of {of} = {divisor}")
