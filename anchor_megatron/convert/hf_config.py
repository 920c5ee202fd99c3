"""Hugging Face's config.json to ModelConfig and back.

    {"model_type": "llama", "hidden_size": 4096, ..., "rope_theta": 5e5}   <->   ModelConfig(hidden_size=4096,
    ...)

Reading refuses, by name, every field that it does not know and every value that our model would compute
differently: nothing that changes the mathematics is skipped in silence. Writing starts from the source's own
file where there is one and replaces what training may change: the rotary embedding and the longest context.
Rotary settings are written as `rope_theta` and `rope_scaling`, which transformers 5 and 4 both read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from anchor_megatron.config import ModelConfig, model_config
from anchor_megatron.convert.families import FAMILIES, NEUTRAL_FIELDS, ROPE_FIELDS, Family
from anchor_megatron.model.rope_scaling import inverse_frequencies, rope_type

__all__ = ["EXTENSIONS", "extend", "family_of", "read_hf_config", "read_model", "write_hf_config"]

# arXiv 2411.13476 raises theta with the context it trains for
EXTENSIONS: dict[str, dict[str, Any]] = {
    "16k": {"rotary_base": 1e6, "rope_scaling": None, "max_position_embeddings": 16384},
    "64k": {"rotary_base": 5e6, "rope_scaling": None, "max_position_embeddings": 65536},
    "128k": {"rotary_base": 1e7, "rope_scaling": None, "max_position_embeddings": 131072},
}
_TRAINABLE = frozenset({"rotary_base", "rope_scaling", "max_position_embeddings"})
_SHAPE = frozenset(field.name for field in dataclasses.fields(ModelConfig)) - _TRAINABLE - {
    "preset", "init_std", "make_vocab_size_divisible_by", "moe_aux_loss_coeff"
}  # fmt: skip


def read_hf_config(path: Path) -> dict[str, Any]:
    """The dictionary in a config.json; ValueError where there is none or it is no JSON object."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a Hugging Face model's config.json, got no such file")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def family_of(hf: dict[str, Any]) -> Family:
    """The family that `model_type` and `architectures` name; ValueError for one we do not have."""
    kind, architectures = hf.get("model_type"), hf.get("architectures")
    supported = ", ".join(f"{kind} ({family.architecture})" for kind, family in FAMILIES.items())
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type: got {kind!r}, expected one of {supported}")
    family = FAMILIES[kind]
    if architectures and architectures != [family.architecture]:
        raise ValueError(f"config.json: architectures: got {architectures}, expected {family.architecture}")
    return family


def read_model(hf: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes. ValueError names the field that does not fit."""
    family = family_of(hf)
    given = {family.aliases.get(name, name): value for name, value in hf.items()}
    _refuse_unknown(given, family)
    values = dict(family.model)
    for name, ours in family.fields.items():
        value = given.get(name)
        if value is None:
            value = family.defaults.get(name)
        if value is None and name not in ("num_key_value_heads", "head_dim"):
            raise ValueError(f"config.json: {name}: got nothing, expected a value")
        values[ours] = value
    values["num_query_groups"] = values["num_query_groups"] or values["num_attention_heads"]
    longest = values["max_position_embeddings"]
    values["rotary_base"], values["rope_scaling"] = _read_rope(given, family, longest)
    try:
        model = model_config(values)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    model = dataclasses.replace(model, kv_channels=_head_dim(model))
    _check_rope(model)
    return model


def extend(model: ModelConfig, preset: str | None, overrides: list[str]) -> ModelConfig:
    """`model` for another context: a preset of EXTENSIONS, then words such as rotary_base=1e6 over it.

    Raises ValueError for an unknown preset, for a field other than rotary_base, rope_scaling and
    max_position_embeddings, and for a scaling that `rope_scaling.py` refuses.
    """
    if preset is not None and preset not in EXTENSIONS:
        raise ValueError(f"--extend: got {preset!r}, expected one of {', '.join(EXTENSIONS)}")
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except Exception as error:  # yaml's scanner and omegaconf each have a family of errors
        raise ValueError(f"overrides {' '.join(overrides)}: {error}") from error
    for name in given:
        if name not in _TRAINABLE:
            raise ValueError(f"override {name}: expected one of {', '.join(sorted(_TRAINABLE))}")
    changed = dataclasses.asdict(model) | EXTENSIONS.get(preset or "", {})
    if isinstance(given.get("rope_scaling"), dict) and isinstance(changed["rope_scaling"], dict):
        given["rope_scaling"] = _same_kind(changed["rope_scaling"], given["rope_scaling"])
    extended = model_config(changed | given)
    _check_rope(extended)
    return extended


def write_hf_config(
    model: ModelConfig,
    source: dict[str, Any] | None,
    *,
    torch_dtype: str,
    longest: int,
    token_ids: dict[str, Any],
) -> dict[str, Any]:
    """The config.json of `model`.

    source: the config.json it was imported with, whose other fields are kept; None for a model trained from
    scratch, whose family is then the one that has its features. longest: max_position_embeddings where the
    model leaves it open. token_ids: bos_token_id and such, for a model without a source. ValueError where no
    family has the model's features, or the source describes another model.
    """
    if source is not None:
        _check_same_model(model, read_model(source))
        aliases = family_of(source).aliases  # which only some versions of transformers read
        hf = {aliases.get(name, name): value for name, value in source.items()}
        hf = {name: value for name, value in hf.items() if name not in ROPE_FIELDS | {"auto_map"}}
    else:
        hf = _from_scratch(model) | token_ids
    hf["dtype" if "dtype" in hf else "torch_dtype"] = torch_dtype
    scaling = dict(model.rope_scaling) if model.rope_scaling else None
    hf["max_position_embeddings"] = model.max_position_embeddings or longest
    hf["rope_theta"] = model.rotary_base
    if scaling is not None and rope_type(scaling) in ("linear", "dynamic"):
        # the one spelling that every transformers from 4.31 on reads
        scaling = {"type": rope_type(scaling), "factor": scaling["factor"]}
    hf["rope_scaling"] = scaling
    if scaling and "original_max_position_embeddings" in scaling and "original_max_position_embeddings" in hf:
        hf["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return hf


def _refuse_unknown(given: dict[str, Any], family: Family) -> None:
    known = NEUTRAL_FIELDS | ROPE_FIELDS | family.unused | set(family.fields) | set(family.fixed)
    for name, value in given.items():
        if name == "layer_types" and value is not None:
            if set(value) != {"full_attention"}:
                raise ValueError(
                    f"config.json: layer_types: got {sorted(set(value))}, expected full_attention alone"
                )
        elif name == "partial_rotary_factor" and value in (None, 1, 1.0):
            continue
        elif name not in known and name != "layer_types":
            raise ValueError(
                f"config.json: {name}: got {value!r}, expected no such field in {given['model_type']}; "
                "if it changes nothing in the model's computation, remove it from the file"
            )
    for name, expected in family.fixed.items():
        value = given.get(name, family.defaults.get(name, expected))
        if value != expected:
            raise ValueError(
                f"config.json: {name}: got {value!r}, expected {expected!r}, all that our model computes"
            )


def _read_rope(given: dict[str, Any], family: Family, longest: int) -> tuple[float, dict[str, Any] | None]:
    """Theta and the scaling (None for none) from the old fields, `rope_parameters`, or both."""
    styles = [dict(given[name]) for name in ("rope_scaling", "rope_parameters") if given.get(name)]
    bases = [style.pop("rope_theta") for style in styles if style.get("rope_theta") is not None]
    if given.get("rope_theta") is not None:
        bases.append(given["rope_theta"])
    scalings = [_tidy(style, longest) for style in styles]
    for name, found in (("rope_theta", bases), ("rope_scaling", scalings)):
        if any(other != found[0] for other in found[1:]):
            raise ValueError(f"config.json: {name}: got {found} in different fields, expected one value")
    base = bases[0] if bases else family.defaults.get("rope_theta", 10000.0)
    return float(base), scalings[0] if scalings else None


def _tidy(scaling: dict[str, Any], longest: int) -> dict[str, Any] | None:
    """The scaling in the new spelling, without what only says "nothing"; None for the plain embedding."""
    kind = rope_type(scaling)
    tidy = {name: value for name, value in scaling.items() if name not in ("type", "rope_type")}
    if tidy.get("partial_rotary_factor") in (None, 1):
        tidy.pop("partial_rotary_factor", None)
    if kind in ("yarn", "llama3"):
        tidy.setdefault("original_max_position_embeddings", longest)  # as transformers does
    return None if kind == "default" and not tidy else {"rope_type": kind, **tidy}


def _head_dim(model: ModelConfig) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def _check_rope(model: ModelConfig) -> None:
    inverse_frequencies(
        head_dim=_head_dim(model),
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=None,
    )


def _same_kind(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Constants alone (rope_scaling.factor=8) change the model's own scaling; a named kind replaces it."""
    return new if "rope_type" in new or "type" in new else old | new


def _check_same_model(model: ModelConfig, source: ModelConfig) -> None:
    for name in sorted(_SHAPE):
        ours, theirs = getattr(model, name), getattr(source, name)
        if name == "kv_channels":
            ours = _head_dim(model)
        if name == "moe_topk" and model.num_experts is None or name == "moe_normalize_topk":
            continue
        if ours != theirs:
            raise ValueError(
                f"source config.json: {name}: got {theirs!r}, expected the checkpoint's {ours!r}"
            )


def _from_scratch(model: ModelConfig) -> dict[str, Any]:
    kind = _family_by_features(model)
    family = FAMILIES[kind]
    hf = {"architectures": [family.architecture], "model_type": kind, "hidden_act": "silu", "use_cache": True}
    values = dataclasses.asdict(model)
    values["kv_channels"] = _head_dim(model)
    hf |= {name: values[ours] for name, ours in family.fields.items()}
    hf |= family.fixed
    if "intermediate_size" in family.unused:
        hf["intermediate_size"] = model.ffn_hidden_size
    if model.num_experts is not None:
        hf["router_aux_loss_coef"] = model.moe_aux_loss_coeff
    return hf


def _family_by_features(model: ModelConfig) -> str:
    """The family with this model's query/key norm, bias and experts."""
    features = (model.qk_layernorm, model.add_qkv_bias, model.num_experts is not None)
    families = {
        (False, False, False): "llama",
        (False, True, False): "qwen2",
        (True, False, False): "qwen3",
        (False, False, True): "mixtral",
        (True, False, True): "qwen3_moe",
    }
    if features not in families or families[features] == "mixtral" and not model.moe_normalize_topk:
        raise ValueError(
            f"model: got qk_layernorm={features[0]}, add_qkv_bias={features[1]}, "
            f"num_experts={model.num_experts}, "
            f"moe_normalize_topk={model.moe_normalize_topk}, expected what one of {', '.join(FAMILIES)} has"
        )
    return families[features]
