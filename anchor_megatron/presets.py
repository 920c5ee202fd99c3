"""Shapes of published models, as fields of `config.ModelConfig` (sources: each model's config.json on Hugging
Face).
"""

from __future__ import annotations

from typing import Any

__all__ = ["MODEL_PRESETS"]


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int, **rest: Any) -> dict[str, Any]:
    return dict(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        **rest,
    )


_LLAMA_31_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_LLAMA_3 = dict(vocab_size=128256, rotary_base=5e5, max_position_embeddings=8192)
_QWEN_25 = dict(add_qkv_bias=True, rotary_base=1e6, layernorm_epsilon=1e-6, max_position_embeddings=32768)
_QWEN_3 = dict(
    vocab_size=151936,
    qk_layernorm=True,
    kv_channels=128,
    rotary_base=1e6,
    layernorm_epsilon=1e-6,
    max_position_embeddings=40960,
)

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _shape(32, 4096, 11008, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    "llama-2-13b": _shape(40, 5120, 13824, 40, 40, vocab_size=32000, max_position_embeddings=4096),
    "llama-2-70b": _shape(80, 8192, 28672, 64, 8, vocab_size=32000, max_position_embeddings=4096),
    "llama-3-8b": _shape(32, 4096, 14336, 32, 8, **_LLAMA_3),
    "llama-3-70b": _shape(80, 8192, 28672, 64, 8, **_LLAMA_3),
    "llama-3.1-8b": _shape(
        32,
        4096,
        14336,
        32,
        8,
        **_LLAMA_3 | dict(rope_scaling=_LLAMA_31_SCALING, max_position_embeddings=131072),
    ),
    "llama-3.2-1b": _shape(
        16,
        2048,
        8192,
        32,
        8,
        **_LLAMA_3
        | dict(
            rope_scaling=_LLAMA_31_SCALING | dict(factor=32.0),
            max_position_embeddings=131072,
            kv_channels=64,
            tie_embeddings=True,
        ),
    ),
    "mistral-7b-v0.3": _shape(
        32, 4096, 14336, 32, 8, vocab_size=32768, rotary_base=1e6, max_position_embeddings=32768
    ),
    "mistral-nemo-12b": _shape(
        40,
        5120,
        14336,
        32,
        8,
        vocab_size=131072,
        kv_channels=128,
        rotary_base=1e6,
        max_position_embeddings=131072,
    ),
    "qwen2-7b": _shape(28, 3584, 18944, 28, 4, vocab_size=152064, **_QWEN_25),
    "qwen2.5-0.5b": _shape(24, 896, 4864, 14, 2, vocab_size=151936, tie_embeddings=True, **_QWEN_25),
    "qwen2.5-7b": _shape(28, 3584, 18944, 28, 4, vocab_size=152064, **_QWEN_25),
    "qwen3-0.6b": _shape(28, 1024, 3072, 16, 8, tie_embeddings=True, **_QWEN_3),
    "qwen3-8b": _shape(36, 4096, 12288, 32, 8, **_QWEN_3),
}
