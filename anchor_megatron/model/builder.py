"""From a configuration to the model: Megatron-Core's TransformerConfig, the layer spec, the GPT of this
pipeline stage.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from anchor_megatron.attention.choose import choose_kernel
from anchor_megatron.config import Config
from anchor_megatron.model.core_attention import PlannedCoreAttention
from anchor_megatron.model.gpt import AnchorGPT
from anchor_megatron.model.norm import RMSNorm
from anchor_megatron.model.rope_scaling import inverse_frequencies

__all__ = ["build_model", "padded_vocab_size", "rank_device", "transformer_config"]


def build_model(config: Config) -> AnchorGPT:
    """The part of the model that this rank's pipeline stage holds, on its device. Needs Megatron-Core's
    groups.

    Raises ValueError where `model.vocab_size` is null (training fills it in from the data set).
    """
    model = config.model
    if model.vocab_size is None:
        raise ValueError("model.vocab_size: got null, expected the tokenizer's number of entries")
    frequencies, attention_factor = inverse_frequencies(
        head_dim=_head_dim(config),
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=config.data.seq_length,
    )
    megatron = transformer_config(config, attention_factor=attention_factor)
    gpt = AnchorGPT(
        config=megatron,
        transformer_layer_spec=_block_spec(config, megatron),
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.data.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_embeddings,
        inverse_frequencies=torch.from_numpy(frequencies),
        real_vocab_size=model.vocab_size,
    )
    return gpt.to(rank_device())


def padded_vocab_size(config: Config) -> int:
    """Rows of the embedding: the vocabulary rounded up so that every tensor-parallel rank holds as many."""
    assert config.model.vocab_size is not None, "the vocabulary's size is filled in before the model is built"
    multiple = math.lcm(config.model.make_vocab_size_divisible_by, config.parallel.tensor)
    return -(-config.model.vocab_size // multiple) * multiple


def transformer_config(config: Config, *, attention_factor: float = 1.0) -> TransformerConfig:
    """Megatron-Core's configuration of the layers. `attention_factor` is YaRN's: it multiplies queries and
    keys.
    """
    model, parallel, train = config.model, config.parallel, config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    on_gpu = rank_device().type == "cuda"
    head_dim = _head_dim(config)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=head_dim,
        softmax_scale=attention_factor**2 / math.sqrt(head_dim),
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        apply_rope_fusion=_has_transformer_engine(),
        persist_layer_norm=False,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **_fp8(config),
        **_recompute(train.recompute),
        **_experts(config),
    )


def _head_dim(config: Config) -> int:
    return config.model.kv_channels or config.model.hidden_size // config.model.num_attention_heads


def _fp8(config: Config) -> dict[str, Any]:
    if config.train.fp8 is None:
        return {}
    if not _has_transformer_engine():
        raise ValueError(
            f"train.fp8: got {config.train.fp8}, expected null without TransformerEngine and a GPU"
        )
    # experts get any number of tokens, FP8 products take multiples of 16
    padding = dict(moe_router_padding_for_quantization=config.model.num_experts is not None)
    return dict(fp8=config.train.fp8, fp8_recipe=config.train.fp8_recipe, **padding)


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if kind == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return {}


def _experts(config: Config) -> dict[str, Any]:
    model = config.model
    if model.num_experts is None:
        return {}
    # Megatron-Core's all-to-all takes its sizes to the host from a GPU only; all-gather does not pad for FP8
    spread = rank_device().type == "cuda" and (config.parallel.expert > 1 or config.train.fp8 is not None)
    return dict(
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=model.ffn_hidden_size,
        moe_router_topk=model.moe_topk,
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_router_pre_softmax=not model.moe_normalize_topk,
        moe_token_dispatcher_type="alltoall" if spread else "allgather",
        moe_grouped_gemm=_has_transformer_engine(),
    )


def _block_spec(config: Config, megatron: TransformerConfig) -> Any:
    """Megatron-Core's layer spec (TransformerEngine's where installed) with our core attention in it."""
    options = dict(num_experts=config.model.num_experts, qk_layernorm=config.model.qk_layernorm)
    kernel = choose_kernel(
        config.attention.kernel, device=rank_device(), dtype=megatron.params_dtype, head_dim=_head_dim(config)
    )
    core_attention = functools.partial(PlannedCoreAttention, kernel=kernel)
    if _has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            moe_grouped_gemm=megatron.moe_grouped_gemm, **options
        )
        spec.submodules.self_attention.submodules.core_attention = core_attention
        return spec
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    _use_own_norms(spec, qk_layernorm=config.model.qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = core_attention
    layers = config.model.num_layers // config.parallel.pipeline
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _use_own_norms(spec: ModuleSpec, *, qk_layernorm: bool) -> None:
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        attention = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm


def _has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def rank_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
