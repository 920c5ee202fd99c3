"""A family's tensor table, spelled out for one model: which rows of which Hugging Face tensor lie where in
Megatron-Core.

Megatron-Core's checkpoints stack the layers (and experts) along leading axes. One `Entry` is one layer's
(expert's) part of a key, with its rows as runs of Hugging Face rows. Layer 1 of 2, hidden size 4, 4 query and
2 key/value heads of size 2:

    key decoder.layers.self_attention.linear_qkv.weight   index (1,) of (2,)   shape (16, 4)
    runs q_proj[0:4] k_proj[0:2] v_proj[0:2]  q_proj[4:8] k_proj[2:4] v_proj[2:4]

Both directions walk the same runs. The vocabulary is padded with zeros as the model pads it for tensor
parallelism; whatever the padding of a checkpoint, rows beyond `vocab_size` stay behind on export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from anchor_megatron.config import ModelConfig
from anchor_megatron.convert.families import Family, Layout

__all__ = ["Entry", "Run", "entries", "extra_states", "hf_shapes", "sizes"]

_FUSED_NORM = "mlp.linear_fc1.layer_norm_weight"
_SEPARATE_NORM = "pre_mlp_layernorm.weight"


@dataclass(frozen=True)
class Run:
    """Rows [start, start + rows) of a Hugging Face tensor."""

    name: str
    start: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """One layer's or expert's slice of a Megatron-Core tensor."""

    key: str
    index: tuple[int, ...]  # () or (layer,) or (layer, expert)
    leading: tuple[int, ...]  # sizes of the axes that `index` points into
    shape: tuple[int, ...]  # of the slice itself: (rows,) or (rows, columns)
    runs: tuple[Run, ...]
    other_keys: tuple[str, ...] = ()  # under which Megatron-Core may look for the same tensor
    padding: int = 0  # rows of zeros after the runs: Megatron-Core pads the vocabulary


def sizes(model: ModelConfig) -> dict[str, int]:
    """The sizes that the tables name."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    assert model.vocab_size is not None, "a model that is converted has a vocabulary"
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "head": head,
        "query": head * model.num_attention_heads,
        "group": head * model.num_query_groups,
        "experts": model.num_experts or 0,
    }


def entries(family: Family, model: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the model, in Hugging Face's order: embedding, layers, final norm, output."""
    size = sizes(model)
    yield _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", model, size)
    for layer in range(model.num_layers):
        for key, layout in family.layer.items():
            # in a mixture of experts the norm before the experts is a module of its own under
            # TransformerEngine
            other = (f"decoder.layers.{_SEPARATE_NORM}",) if family.expert and key == _FUSED_NORM else ()
            yield _entry(f"decoder.layers.{key}", layout, model, size, (layer,), other)
        for expert in range(size["experts"]):
            for key, layout in family.expert.items():
                yield _entry(
                    f"decoder.layers.mlp.experts.experts.{key}", layout, model, size, (layer, expert)
                )
    yield _entry("decoder.final_layernorm.weight", Layout((("model.norm.weight", "hidden"),)), model, size)
    if not model.tie_embeddings:
        yield _vocabulary("output_layer.weight", "lm_head.weight", model, size)


def hf_shapes(model_entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors that the entries take rows from, in order, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in model_entries:
        for run in entry.runs:
            rows = max(shapes.get(run.name, (0,))[0], run.start + run.rows)
            shapes[run.name] = (rows, *entry.shape[1:])
    return shapes


def extra_states(family: Family, model: ModelConfig) -> list[str]:
    """Names of the module states (empty but for FP8) that Megatron-Core expects beside the weights.

    A superset: which modules ask for theirs differs between its own layers and TransformerEngine's.
    """
    layers, experts = model.num_layers, model.num_experts or 0
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.q_layernorm",
               "self_attention.k_layernorm", "input_layernorm", "pre_mlp_layernorm"]  # fmt: skip
    if not experts:
        modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    names = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(layers):
        names += [f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}" for module in modules]
        for expert in range(experts):
            place = f"shard_{layer}.{expert}_{layers}.{experts}"
            names += [
                f"decoder.layers.mlp.experts.experts.{fc}._extra_state/{place}"
                for fc in ("linear_fc1", "linear_fc2")
            ]
    return names


def _entry(
    key: str,
    layout: Layout,
    model: ModelConfig,
    size: dict[str, int],
    index: tuple[int, ...] = (),
    other_keys: tuple[str, ...] = (),
) -> Entry:
    runs = tuple(_grouped(layout, model, size) if layout.by_group else _stacked(layout, size))
    if index:
        expert = index[1] if len(index) > 1 else None
        prefix = f"model.layers.{index[0]}."
        runs = tuple(Run(prefix + run.name.format(expert=expert), run.start, run.rows) for run in runs)
    rows = sum(run.rows for run in runs)
    shape = (rows,) if layout.columns is None else (rows, size[layout.columns])
    leading = (model.num_layers, size["experts"])[: len(index)]
    return Entry(key, index, leading, shape, runs, other_keys)


def _vocabulary(key: str, name: str, model: ModelConfig, size: dict[str, int]) -> Entry:
    entry = _entry(key, Layout(((name, "vocab"),), "hidden"), model, size)
    return dataclasses.replace(entry, padding=-size["vocab"] % model.make_vocab_size_divisible_by)


def _stacked(layout: Layout, size: dict[str, int]) -> Iterator[Run]:
    used: dict[str, int] = {}
    for name, rows in layout.parts:
        yield Run(name, used.get(name, 0), size[rows])
        used[name] = used.get(name, 0) + size[rows]


def _grouped(layout: Layout, model: ModelConfig, size: dict[str, int]) -> Iterator[Run]:
    parts = list(_stacked(layout, size))
    for group in range(model.num_query_groups):
        for part in parts:
            rows = part.rows // model.num_query_groups
            yield Run(part.name, part.start + group * rows, rows)
