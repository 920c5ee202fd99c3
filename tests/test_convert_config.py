"""config.json to ModelConfig and back: published files, transformers' defaults, rotary settings, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from anchor_megatron.config import ModelConfig, model_config
from anchor_megatron.convert.families import FAMILIES
from anchor_megatron.convert.hf_config import EXTENSIONS, extend, read_model, write_hf_config

LLAMA_31_ROPE = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
)
COMMON = dict(
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    initializer_range=0.02,
    torch_dtype="bfloat16",
    transformers_version="4.42.0",
    use_cache=True,
    tie_word_embeddings=False,
)


def file_of(kind: str, *sizes: float, **rest: Any) -> dict[str, Any]:
    names = dict(model_type=kind, architectures=[FAMILIES[kind].architecture])
    return COMMON | names | dict(zip(SIZES, sizes, strict=True)) | rest


def llama(*sizes: float, **rest: Any) -> dict[str, Any]:
    fields = dict(rms_norm_eps=1e-5, pretraining_tp=1, attention_bias=False, mlp_bias=False)
    return file_of("llama", *sizes, **fields | rest)


def mistral(*sizes: float, **rest: Any) -> dict[str, Any]:
    return file_of("mistral", *sizes, **dict(rms_norm_eps=1e-5, sliding_window=None) | rest)


def qwen(kind: str, *sizes: float, **rest: Any) -> dict[str, Any]:
    return file_of(kind, *sizes, **dict(rms_norm_eps=1e-6, use_sliding_window=False) | rest)


# as published on the hub, by our preset of the same shape
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": llama(4096, 11008, 32, 32, 32, 32000, 4096, 1e4, rope_scaling=None),
    "llama-2-70b": llama(8192, 28672, 80, 64, 8, 32000, 4096, 1e4, rope_scaling=None),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256, 8192, 500000.0),
    "llama-3.1-8b": llama(4096, 14336, 32, 32, 8, 128256, 131072, 500000.0, rope_scaling=LLAMA_31_ROPE,
                          eos_token_id=[128001, 128008, 128009]),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, 131072, 500000.0, head_dim=64,
                          rope_scaling=LLAMA_31_ROPE | {"factor": 32.0}, tie_word_embeddings=True),
    "mistral-7b-v0.3": mistral(4096, 14336, 32, 32, 8, 32768, 32768, 1000000.0),
    "mistral-nemo-12b": mistral(5120, 14336, 40, 32, 8, 131072, 131072, 1000000.0, head_dim=128),
    "qwen2-7b": qwen("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, 1000000.0, max_window_layers=28,
                     sliding_window=131072),
    "qwen2.5-0.5b": qwen("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1000000.0, max_window_layers=24,
                         sliding_window=32768, tie_word_embeddings=True, use_mrope=False),
    "qwen3-8b": qwen("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, 1000000.0, head_dim=128,
                     attention_bias=False, max_window_layers=36, sliding_window=None, rope_scaling=None),
}  # fmt: skip


def by_meaning(model: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(model) | {"preset": None}
    values["kv_channels"] = model.kv_channels or model.hidden_size // model.num_attention_heads
    return values


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_files_are_our_presets(preset: str) -> None:
    assert by_meaning(read_model(PUBLISHED[preset])) == by_meaning(model_config({"preset": preset}))


def test_mixtures_of_experts() -> None:
    mixtral = file_of("mixtral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e6, rms_norm_eps=1e-5,
                      num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
                      output_router_logits=False, router_aux_loss_coef=0.02)  # fmt: skip
    model = read_model(mixtral)
    assert (model.num_experts, model.moe_topk, model.ffn_hidden_size) == (8, 2, 14336)
    assert model.moe_normalize_topk and not model.qk_layernorm
    qwen3 = qwen("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960, 1e6, head_dim=128, num_experts=128,
                 moe_intermediate_size=768, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
                 mlp_only_layers=[], attention_bias=False, sliding_window=None, max_window_layers=48,
                 router_aux_loss_coef=0.001, output_router_logits=False)  # fmt: skip
    model = read_model(qwen3)
    assert (model.num_experts, model.moe_topk, model.ffn_hidden_size) == (128, 8, 768)
    assert model.moe_normalize_topk and model.qk_layernorm and model.kv_channels == 128


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind: str) -> None:
    family, theirs = FAMILIES[kind], AutoConfig.for_model(kind)
    for name, value in family.defaults.items():
        if name == "rope_theta":
            assert theirs.rope_parameters["rope_theta"] == value
        elif name != "head_dim":
            assert (name, getattr(theirs, name)) == (name, value if name != "sliding_window" else 4096)
        else:  # theirs is filled in with hidden_size / num_attention_heads where there is no default
            expected = value or theirs.hidden_size // theirs.num_attention_heads
            assert (getattr(theirs, name, None) or expected) == expected
    for name, value in family.fixed.items():
        default = family.defaults.get(name, value)
        assert (name, getattr(theirs, name, default)) == (name, default)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mistral v0.1": (PUBLISHED["mistral-7b-v0.3"] | {"sliding_window": 4096}, "sliding_window: got 4096"),
    "mistral that leaves its window out": (
        {name: value for name, value in PUBLISHED["mistral-7b-v0.3"].items() if name != "sliding_window"},
        "sliding_window: got 4096",
    ),
    "qwen with a window": (PUBLISHED["qwen2-7b"] | {"use_sliding_window": True}, "use_sliding_window: got"),
    "windows by layer": (
        PUBLISHED["qwen3-8b"] | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types: got .*sliding_attention",
    ),
    "biases": (PUBLISHED["llama-3-8b"] | {"attention_bias": True}, "attention_bias: got True"),
    "biases in the MLP": (PUBLISHED["llama-3-8b"] | {"mlp_bias": True}, "mlp_bias: got True"),
    "another activation": (PUBLISHED["llama-3-8b"] | {"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    "quantised": (PUBLISHED["llama-3-8b"] | {"quantization_config": {"bits": 4}}, "quantization_config: got"),
    "an unknown field": (PUBLISHED["llama-3-8b"] | {"attn_logit_softcapping": 50.0}, "softcapping: got 50"),
    "half the head rotated": (PUBLISHED["llama-3-8b"] | {"partial_rotary_factor": 0.5}, "partial_rotary"),
    "half the head rotated, new style": (
        PUBLISHED["llama-3-8b"] | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "longrope": (
        PUBLISHED["llama-3-8b"] | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "rope_type: got 'longrope'",
    ),
    "a scaling without its factor": (
        PUBLISHED["llama-3-8b"] | {"rope_scaling": {"rope_type": "linear"}},
        "rope_scaling.factor",
    ),
    "two thetas": (
        PUBLISHED["llama-3-8b"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta: got",
    ),
    "two scalings": (
        PUBLISHED["llama-3.1-8b"] | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling: got",
    ),
    "a missing size": (PUBLISHED["llama-3-8b"] | {"hidden_size": None}, "hidden_size: got nothing"),
    "a size of the wrong type": (PUBLISHED["llama-3-8b"] | {"hidden_size": "wide"}, "hidden_size"),
    "dense layers among experts": (
        qwen("qwen3_moe", 64, 64, 2, 4, 2, 99, 64, 1e4, mlp_only_layers=[0]),
        "mlp_only_layers: got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_would_compute_differently_is_refused_by_name(case: str) -> None:
    hf, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_model(hf)


SCALINGS = [
    None,
    dict(rope_type="linear", factor=2.0),
    dict(rope_type="dynamic", factor=4.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, beta_fast=16.0),
    LLAMA_31_ROPE,
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling and scaling["rope_type"]))
@pytest.mark.parametrize("style", ["old", "new", "new over old"])
def test_rotary_settings_of_every_style_are_read_and_written_for_all(
    scaling: dict[str, Any] | None, style: str, tmp_path: Path
) -> None:
    source = PUBLISHED["llama-3-8b"] | {"rope_theta": 123456.0, "max_position_embeddings": 65536}
    if style == "old":
        source["rope_scaling"] = scaling and {
            "type" if k == "rope_type" else k: v for k, v in scaling.items()
        }
    else:
        source["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": 123456.0}
    if style == "new":
        del source["rope_theta"]
    model = read_model(source)
    assert (model.rotary_base, model.rope_scaling) == (123456.0, scaling)
    written = write_hf_config(model, source, torch_dtype="bfloat16", longest=1, token_ids={})
    assert read_model(written) == model
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs.pop("rope_theta") == 123456.0 and theirs.pop("type", None) in (None, theirs["rope_type"])
    assert theirs == (scaling or {"rope_type": "default"})
    # transformers 4 looks at these two alone
    assert written["rope_theta"] == 123456.0
    assert (written["rope_scaling"] or {}).items() >= {
        k: v for k, v in (scaling or {}).items() if k != "rope_type"
    }.items()


@pytest.mark.parametrize(
    ("name", "base", "longest"), [("16k", 1e6, 16384), ("64k", 5e6, 65536), ("128k", 1e7, 131072)]
)
def test_the_papers_extensions(name: str, base: float, longest: int) -> None:
    model = read_model(PUBLISHED["llama-3.1-8b"])
    extended = extend(model, name, [])
    assert (extended.rotary_base, extended.max_position_embeddings, extended.rope_scaling) == (
        base,
        longest,
        None,
    )
    written = write_hf_config(
        extended, PUBLISHED["llama-3.1-8b"], torch_dtype="bfloat16", longest=1, token_ids={}
    )
    assert (written["rope_theta"], written["max_position_embeddings"], written["rope_scaling"]) == (
        base,
        longest,
        None,
    )
    assert set(EXTENSIONS) == {"16k", "64k", "128k"}


def test_overrides() -> None:
    model = read_model(PUBLISHED["llama-3.1-8b"])
    assert extend(model, None, []) == model
    changed = extend(model, "64k", ["rotary_base=2.5e6", "max_position_embeddings=80000"])
    assert (changed.rotary_base, changed.max_position_embeddings) == (2.5e6, 80000)
    assert extend(model, None, ["rope_scaling.factor=16"]).rope_scaling == LLAMA_31_ROPE | {"factor": 16}
    yarn = "rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 8192}"
    assert extend(model, None, [yarn]).rope_scaling == dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=8192
    )
    assert extend(model, None, ["rope_scaling=null"]).rope_scaling is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hidden_size=3"], "override hidden_size"),
        (["rope_scaling={rope_type: nonsense}"], "rope_type: got 'nonsense'"),
        (["rope_scaling={rope_type: linear}"], "rope_scaling.factor"),
        (["rotary_base=wide"], "rotary_base"),
        (["rope_scaling={"], "overrides rope_scaling"),
    ],
)
def test_bad_overrides_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend(read_model(PUBLISHED["llama-3-8b"]), None, words)
    with pytest.raises(ValueError, match="--extend: got '1m'"):
        extend(read_model(PUBLISHED["llama-3-8b"]), "1m", [])


def test_features_that_no_family_has_cannot_be_exported() -> None:
    for features in (
        dict(add_qkv_bias=True, qk_layernorm=True),
        dict(num_experts=4, moe_normalize_topk=False),
    ):
        with pytest.raises(ValueError, match="expected what one of"):
            write_hf_config(
                ModelConfig(vocab_size=9, **features), None, torch_dtype="", longest=8, token_ids={}
            )
