"""Rotary frequencies of every kind of scaling, against transformers' own functions and modules."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from anchor_megatron.model.rope_scaling import inverse_frequencies, rope_type
from anchor_megatron.model.rotary import RotaryAngles

EPSILON = 2.0**-24  # half a unit in the last place of an fp32 number around one
LONGEST = 32768
POSITIONS = (0, 1, 8191, 131071, 1048575)
SCALINGS = {
    "default": None,
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn, every constant": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, given factor": {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3, 32 times": {
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 4096,
    },
}


def named(name: str, key: str = "rope_type") -> dict | None:
    constants = SCALINGS[name]
    return None if constants is None else {key: name.split(",")[0], **constants}


def theirs(name: str, head_dim: int, base: float) -> LlamaConfig:
    parameters = {"rope_theta": base, **(named(name) or {"rope_type": "default"})}
    return LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=LONGEST,
        rope_parameters=parameters,
    )


def ours(name: str, head_dim: int, base: float, seq_length: int | None = None) -> tuple[np.ndarray, float]:
    return inverse_frequencies(
        head_dim=head_dim,
        rotary_base=base,
        rope_scaling=named(name),
        max_position_embeddings=LONGEST,
        seq_length=seq_length,
    )


@pytest.mark.parametrize("base", [1e4, 5e5, 1e7])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_frequencies_equal_transformers_functions(name: str, head_dim: int, base: float) -> None:
    for seq_length in (None, 1000, LONGEST, 1048576):
        expected, factor = ROPE_INIT_FUNCTIONS[name.split(",")[0]](
            theirs(name, head_dim, base), torch.device("cpu"), seq_len=seq_length
        )
        found, found_factor = ours(name, head_dim, base, seq_length)
        assert found.dtype == np.float64 and found.shape == (head_dim // 2,)
        # their fp32 power alone is good to a few units in the last place times the exponent's magnitude
        np.testing.assert_allclose(found, expected.double().numpy(), rtol=2 * EPSILON * math.log(base) * 4)
        assert found_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers_modules(name: str) -> None:
    """cos and sin at far positions. An fp32 angle a is rounded to eps * a, which may separate the tables."""
    head_dim, base = 64, 5e5
    module = LlamaRotaryEmbedding(theirs(name, head_dim, base))
    positions = torch.tensor(POSITIONS)
    cos, sin = module(torch.zeros(1), positions[None])
    frequencies, factor = ours(name, head_dim, base, seq_length=POSITIONS[-1] + 1)
    angles = RotaryAngles(torch.from_numpy(frequencies))(positions)[:, 0, 0]
    size = torch.outer(positions.double(), torch.from_numpy(np.concatenate([frequencies, frequencies])))
    bound = factor * EPSILON * (4 + 2 * 4 * math.log(base) * size)
    for expected, found in ((cos[0], angles.cos()), (sin[0], angles.sin())):
        assert ((found.double() * factor - expected.double()).abs() <= bound).all()
    # the bound must bite where it can: the smallest angles at the farthest position are known to 1e-4
    assert bound[-1].min() < 1e-4


def test_a_tiny_table_by_hand() -> None:
    common = dict(head_dim=4, rotary_base=100.0, max_position_embeddings=16, seq_length=32)
    np.testing.assert_allclose(inverse_frequencies(rope_scaling=None, **common)[0], [1, 0.1], rtol=1e-15)
    scaled, factor = inverse_frequencies(rope_scaling={"type": "linear", "factor": 2}, **common)
    np.testing.assert_allclose(scaled, [0.5, 0.05], rtol=1e-15)
    assert factor == 1.0
    # dynamic: base 100 * (2 * 32 / 16 - 1) ** (4 / 2) = 900, so the slow pair turns at 1/30
    scaled, _ = inverse_frequencies(rope_scaling={"type": "dynamic", "factor": 2}, **common)
    np.testing.assert_allclose(scaled, [1, 1 / 30], rtol=1e-15)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_old_and_new_style_dictionaries_mean_the_same(name: str) -> None:
    common = dict(head_dim=32, rotary_base=1e4, max_position_embeddings=LONGEST, seq_length=None)
    new, factor = inverse_frequencies(rope_scaling=named(name), **common)
    for given in (
        named(name, "type"),
        named(name) | {"type": name.split(",")[0]},
        named(name) | {"rope_theta": 1e4},
    ):
        found, found_factor = inverse_frequencies(rope_scaling=given, **common)
        assert (found == new).all() and found_factor == factor


BAD = [
    ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
    ({"rope_type": "linear"}, "rope_scaling.factor"),
    ({"rope_type": "linear", "factor": "two"}, "rope_scaling.factor"),
    ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor"),
    ({"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}, "rope_scaling.mrope_section"),
    ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "linear and yarn"),
    ({"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}, "rope_scaling.rope_theta"),
    ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_type": "yarn", "factor": 2.0}, "rope_scaling.original_max_position_embeddings"),
    (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        "rope_scaling.low_freq_factor",
    ),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
        },
        "rope_scaling.high_freq_factor",
    ),
]


@pytest.mark.parametrize(("scaling", "named_in_error"), BAD)
def test_what_is_wrong_is_named(scaling: dict, named_in_error: str) -> None:
    with pytest.raises(ValueError, match=named_in_error):
        inverse_frequencies(
            head_dim=32, rotary_base=1e4, rope_scaling=scaling, max_position_embeddings=4096, seq_length=None
        )


def test_dynamic_needs_the_models_maximum() -> None:
    with pytest.raises(ValueError, match="max_position_embeddings"):
        inverse_frequencies(
            head_dim=32,
            rotary_base=1e4,
            rope_scaling={"type": "dynamic", "factor": 2.0},
            max_position_embeddings=None,
            seq_length=None,
        )


def test_rope_type_of_nothing_is_default() -> None:
    assert rope_type(None) == rope_type({}) == "default"
    with pytest.raises(ValueError, match="head_dim"):
        inverse_frequencies(
            head_dim=33, rotary_base=1e4, rope_scaling=None, max_position_embeddings=None, seq_length=None
        )
