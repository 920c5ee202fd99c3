"""Does a checkpoint belong to this model? Asked before anything is loaded, answered by the field or tensor.

    runs/a/step_0000100: model.hidden_size: got 128, expected the checkpoint's 64

Megatron-Core would say so in the middle of a load, in a message that lists every tensor, or, where the
sizes happen to agree (8 heads of 16 for 4 of 32), load what means something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from anchor_megatron.config import model_config, read_sections
from anchor_megatron.model.gpt import AnchorGPT

__all__ = ["check_fit"]


def check_fit(gpt: AnchorGPT, folder: Path) -> None:
    """ValueError naming the checkpoint `folder` and the field or tensor in which `gpt` differs from it.

    Fields are compared where the folder has a config.yaml, tensors (of this rank's pipeline stage) always.
    """
    if (folder / "config.yaml").is_file():
        for field, got, expected in _fields(gpt, folder / "config.yaml"):
            if got != expected:
                raise ValueError(f"{folder}: model.{field}: got {got}, expected the checkpoint's {expected}")
    saved = dist_checkpointing.load_tensors_metadata(str(folder))
    for tensor in _tensors(gpt):
        if tensor.key not in saved:
            raise ValueError(f"{folder}: {tensor.key}: got no such tensor, expected {tensor.global_shape}")
        found, expected = tuple(saved[tensor.key].global_shape), tuple(tensor.global_shape)
        # rows of the vocabulary's padding, of which another tensor-parallel size may need more or fewer
        padded = tensor.allow_shape_mismatch and found[1:] == expected[1:]
        if found != expected and not padded:
            raise ValueError(f"{folder}: {tensor.key}: got shape {found}, expected the model's {expected}")


def _fields(gpt: AnchorGPT, file: Path) -> Iterator[tuple[str, Any, Any]]:
    """Name, this model's value and the checkpoint's of all that decides a tensor's shape or meaning."""
    saved, built = model_config(read_sections(file).get("model", {})), gpt.config
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        yield name, getattr(built, name), getattr(saved, name)
    head_dim = saved.kv_channels or saved.hidden_size // saved.num_attention_heads
    yield "vocab_size", gpt.real_vocab_size, saved.vocab_size
    yield "kv_channels", built.kv_channels, head_dim
    yield "add_qkv_bias", built.add_qkv_bias, saved.add_qkv_bias
    yield "qk_layernorm", built.qk_layernorm, saved.qk_layernorm
    yield "tie_embeddings", gpt.share_embeddings_and_output_weights, saved.tie_embeddings
    yield "num_experts", built.num_moe_experts, saved.num_experts


def _tensors(gpt: AnchorGPT) -> Iterator[ShardedTensor]:
    state = gpt.sharded_state_dict()
    apply_factories(state)
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))
