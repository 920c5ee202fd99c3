"""The supported families: one table of tensors and one of configuration fields each, read in both directions.

A tensor table maps a Megatron-Core key to the Hugging Face tensors whose rows make it up:

    "mlp.linear_fc1.weight": stack(("mlp.gate_proj.weight", "ffn"), ("mlp.up_proj.weight", "ffn"), ...)

reads: the rows of gate_proj, `ffn` of them, then those of up_proj. `groups` interleaves queries, keys and
values the way Megatron-Core keeps them: for each key/value head its query heads, itself, its value head. With
4 query heads, 2 key/value heads and heads of one row, [q0 q1 q2 q3], [k0 k1], [v0 v1] become [q0 q1 k0 v0 q2
q3 k1 v1].

A Hugging Face tensor named twice in one entry (Phi-3 fuses q, k and v) lends successive rows of itself. Keys
are below `decoder.layers.`, names below `model.layers.<layer>.`, `{expert}` counts experts. Nothing is
transposed or rescaled: a family that needs that (Gemma adds one to its norms and caps its logits) is not a
table and is refused by name.

Configuration fields fall into four sets, and one in none of them is refused: those that become a field of
ModelConfig, the rotary ones (`hf_config.py`), those that must have one value because our model has no other,
and the neutral ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "NEUTRAL_FIELDS", "ROPE_FIELDS", "Family", "Layout"]


@dataclass(frozen=True)
class Layout:
    """How one Megatron-Core tensor is made of rows of Hugging Face's; sizes are those of `mapping.sizes`."""

    parts: tuple[tuple[str, str], ...]  # (Hugging Face name, number of rows)
    columns: str | None = None
    by_group: bool = False  # the parts are q, k, v, to be interleaved


def stack(*parts: tuple[str, str], columns: str | None = None) -> Layout:
    """The parts' rows one after another."""
    return Layout(parts, columns)


def groups(query: str, key: str, value: str, columns: str | None = None) -> Layout:
    """Queries, keys and values interleaved by key/value head."""
    return Layout(((query, "query"), (key, "group"), (value, "group")), columns, by_group=True)


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face."""

    architecture: str
    layer: dict[str, Layout]
    fields: dict[str, str]  # configuration field -> field of ModelConfig
    defaults: dict[str, Any]  # what transformers takes for a field that the file leaves out
    fixed: dict[str, Any]  # fields whose other values our model cannot compute
    model: dict[str, Any] = field(
        default_factory=dict
    )  # fields of ModelConfig that the family itself decides
    aliases: dict[str, str] = field(default_factory=dict)  # other names of fields
    unused: frozenset[str] = frozenset()  # fields that describe nothing, given the fixed ones
    expert: dict[str, Layout] = field(default_factory=dict)  # of every expert, below `mlp.experts.`


_ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": stack(("input_layernorm.weight", "hidden")),
    "self_attention.linear_qkv.weight": groups(
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", columns="hidden"
    ),
    "self_attention.linear_proj.weight": stack(("self_attn.o_proj.weight", "hidden"), columns="query"),
    "mlp.linear_fc1.layer_norm_weight": stack(("post_attention_layernorm.weight", "hidden")),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": groups(
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"
    )
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": stack(("self_attn.q_norm.weight", "head")),
    "self_attention.k_layernorm.weight": stack(("self_attn.k_norm.weight", "head")),
}


_FUSED_QKV = groups(
    "self_attn.qkv_proj.weight", "self_attn.qkv_proj.weight", "self_attn.qkv_proj.weight", columns="hidden"
)


def _gated_mlp(gate: str, up: str, down: str) -> dict[str, Layout]:
    return {
        "linear_fc1.weight": stack((f"{gate}.weight", "ffn"), (f"{up}.weight", "ffn"), columns="hidden"),
        "linear_fc2.weight": stack((f"{down}.weight", "hidden"), columns="ffn"),
    }


def _below(prefix: str, table: dict[str, Layout]) -> dict[str, Layout]:
    return {prefix + key: layout for key, layout in table.items()}


_MLP = _below("mlp.", _gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_MIXTRAL_EXPERT = "block_sparse_moe.experts.{expert}."
_QWEN_EXPERT = "mlp.experts.{expert}."

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False, "head_dim": None}
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
_NO_WINDOW = {"sliding_window": None}
# Qwen's files name a window that use_sliding_window switches off
_QWEN_FIXED = _FIXED | {"use_sliding_window": False, "use_mrope": False}
_QWEN_UNUSED = frozenset({"sliding_window", "max_window_layers"})

ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
NEUTRAL_FIELDS = frozenset(
    """_name_or_path _commit_hash architectures auto_map model_type dtype torch_dtype transformers_version
    use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id tokenizer_class pretraining_tp
    output_router_logits router_aux_loss_coef original_max_position_embeddings return_dict output_attentions
    output_hidden_states chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type
    is_llama_config""".split()
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        layer=_ATTENTION | _MLP,
        fields=_FIELDS,
        defaults=_DEFAULTS | {"max_position_embeddings": 2048},
        fixed=_FIXED | {"attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        layer=_ATTENTION | _MLP,
        fields=_FIELDS,
        defaults=_DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        fixed=_FIXED | _NO_WINDOW,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        layer=_ATTENTION | _QKV_BIAS | _MLP,
        fields=_FIELDS,
        defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        fixed=_QWEN_FIXED,
        model={"add_qkv_bias": True},
        unused=_QWEN_UNUSED,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        layer=_ATTENTION | _QK_NORM | _MLP,
        fields=_FIELDS,
        defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        fixed=_QWEN_FIXED | {"attention_bias": False},
        model={"qk_layernorm": True},
        unused=_QWEN_UNUSED,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        layer=_ATTENTION
        | {
            "self_attention.linear_qkv.weight": _FUSED_QKV,
            "mlp.linear_fc1.weight": stack(*[("mlp.gate_up_proj.weight", "ffn")] * 2, columns="hidden"),
            "mlp.linear_fc2.weight": _MLP["mlp.linear_fc2.weight"],
        },
        fields=_FIELDS,
        defaults=_DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        fixed=_FIXED | _NO_WINDOW | {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        layer=_ATTENTION
        | {"mlp.router.weight": stack(("block_sparse_moe.gate.weight", "experts"), columns="hidden")},
        expert=_gated_mlp(_MIXTRAL_EXPERT + "w1", _MIXTRAL_EXPERT + "w3", _MIXTRAL_EXPERT + "w2"),
        fields=_FIELDS | {"num_local_experts": "num_experts", "num_experts_per_tok": "moe_topk"},
        defaults=_DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
        fixed=_FIXED | _NO_WINDOW | {"router_jitter_noise": 0.0},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        layer=_ATTENTION
        | _QK_NORM
        | {"mlp.router.weight": stack(("mlp.gate.weight", "experts"), columns="hidden")},
        expert=_gated_mlp(_QWEN_EXPERT + "gate_proj", _QWEN_EXPERT + "up_proj", _QWEN_EXPERT + "down_proj"),
        fields={name: to for name, to in _FIELDS.items() if name != "intermediate_size"}
        | {"moe_intermediate_size": "ffn_hidden_size", "num_experts": "num_experts"}
        | {"num_experts_per_tok": "moe_topk", "norm_topk_prob": "moe_normalize_topk"},
        defaults=_DEFAULTS
        | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "norm_topk_prob": False}
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        fixed=_QWEN_FIXED | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        model={"qk_layernorm": True},
        aliases={"num_local_experts": "num_experts"},
        unused=_QWEN_UNUSED | {"intermediate_size"},
    ),
}
