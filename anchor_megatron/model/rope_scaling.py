"""Inverse frequencies of the rotary embedding, plain or stretched, from Hugging Face's `rope_scaling`
dictionary.

    inverse_frequencies(head_dim=4, rotary_base=100.0, rope_scaling=None, ...)           -> [1, 1/10],  1.0
    inverse_frequencies(..., rope_scaling={"rope_type": "linear", "factor": 2.0}, ...)   -> [1/2, 1/20], 1.0

The angle of a token at position p in pair i is p * frequency[i]. Every constant comes from the dictionary;
only what Hugging Face documents as optional (YaRN's betas, `truncate`, `attention_factor`) may be left out.
The kind is named by `rope_type`, or by `type` in older files; `rope_theta` may stand in the dictionary
(transformers 5's `rope_parameters`) but then it must be the `rotary_base` given. All in fp64: transformers
does the sums in fp32.

Sources: transformers' `modeling_rope_utils.py`; linear: kaiokendev; dynamic: NTK-aware scaling of bloc97 and
emozilla; yarn: arXiv 2309.00071; llama3: the Llama 3.1 reference code.

Legend: H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["inverse_frequencies", "rope_type"]


@dataclass(frozen=True)
class _Rope:
    """What a kind of scaling may look at."""

    head_dim: int
    rotary_base: float
    constants: Mapping[str, Any]
    max_position_embeddings: int | None
    seq_length: int | None

    def plain(self, base: float | None = None) -> np.ndarray:
        """base ** (-2i / H) for i in [0, H/2), fp64."""
        return (base or self.rotary_base) ** (
            -np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        )

    def number(self, key: str, default: float | None = None) -> float:
        """The constant `key`; where it is absent or null, `default`, or a ValueError if there is none."""
        value = self.constants.get(key)
        if value is None:
            if default is None:
                raise ValueError(
                    f"rope_scaling.{key}: got nothing, expected a number for {rope_type(self.constants)!r}"
                )
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"rope_scaling.{key}: got {value!r}, expected a number of at least 0")
        return float(value)


_Scaled = tuple[np.ndarray, float]


def inverse_frequencies(
    *,
    head_dim: int,
    rotary_base: float,
    rope_scaling: Mapping[str, Any] | None,
    max_position_embeddings: int | None,
    seq_length: int | None,
) -> _Scaled:
    """Radians a token for each pair of the head, fp64 [H/2], and YaRN's attention factor (1.0 for the other
    kinds).

    The attention factor multiplies queries and keys alike, so scores carry its square. `seq_length` (the
    longest sequence met) and `max_position_embeddings` matter to `dynamic` only. Raises ValueError naming the
    field for an odd head_dim, an unknown kind, and a constant that is missing, of no use to the kind, or out
    of range.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim}, expected a positive even number")
    if rotary_base <= 1:
        raise ValueError(f"rotary_base: got {rotary_base}, expected more than 1")
    constants = dict(rope_scaling or {})
    kind = rope_type(constants)
    scale, known = _KINDS[kind]
    for key in constants:
        if key not in known | _COMMON_KEYS:
            raise ValueError(
                f"rope_scaling.{key}: got {constants[key]!r}, expected no such field for {kind!r}"
            )
    _check_common(constants, rotary_base)
    return scale(_Rope(head_dim, float(rotary_base), constants, max_position_embeddings, seq_length))


def rope_type(rope_scaling: Mapping[str, Any] | None) -> str:
    """The kind a dictionary names, in the new or the old style; "default" where it names none."""
    given = {
        str(rope_scaling[key]) for key in ("rope_type", "type") if rope_scaling and rope_scaling.get(key)
    }
    if len(given) > 1:
        raise ValueError(
            f"rope_scaling: got rope_type and type {' and '.join(sorted(given))}, expected one kind"
        )
    kind = given.pop() if given else "default"
    if kind not in _KINDS:
        raise ValueError(f"rope_scaling.rope_type: got {kind!r}, expected one of {', '.join(_KINDS)}")
    return kind


def _check_common(constants: Mapping[str, Any], rotary_base: float) -> None:
    theta, partial = constants.get("rope_theta"), constants.get("partial_rotary_factor")
    if theta is not None and float(theta) != float(rotary_base):
        raise ValueError(f"rope_scaling.rope_theta: got {theta}, expected rotary_base = {rotary_base}")
    if partial is not None and partial != 1:
        raise ValueError(
            f"rope_scaling.partial_rotary_factor: got {partial}, expected 1 (the whole head is rotated)"
        )


def _default(rope: _Rope) -> _Scaled:
    return rope.plain(), 1.0


def _linear(rope: _Rope) -> _Scaled:
    return rope.plain() / _factor(rope), 1.0


def _dynamic(rope: _Rope) -> _Scaled:
    """The base grows with the sequence, once it is longer than the model's maximum."""
    factor, longest = _factor(rope), rope.max_position_embeddings
    if longest is None:
        raise ValueError(
            "max_position_embeddings: got null, expected the model's own for rope_type 'dynamic'"
        )
    length = max(rope.seq_length or 0, longest)
    stretch = (factor * length / longest) - (factor - 1)
    exponent = rope.head_dim / (rope.head_dim - 2) if rope.head_dim > 2 else 1.0
    return rope.plain(rope.rotary_base * stretch**exponent), 1.0


def _yarn(rope: _Rope) -> _Scaled:
    """Fast pairs keep their frequency, slow ones are divided by the factor, those between are blended."""
    factor, length = _factor(rope), rope.number("original_max_position_embeddings")
    low = _pair_that_turns(rope, rope.number("beta_fast", 32.0), length)
    high = _pair_that_turns(rope, rope.number("beta_slow", 1.0), length)
    if rope.constants.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does: a ramp of no width would divide by zero
    slow = np.clip((np.arange(rope.head_dim // 2) - low) / (high - low), 0.0, 1.0)
    plain = rope.plain()
    return plain / factor * slow + plain * (1.0 - slow), _attention_factor(rope, factor)


def _pair_that_turns(rope: _Rope, rotations: float, length: float) -> float:
    """The (fractional) pair that turns `rotations` times over `length` tokens."""
    return rope.head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rotary_base))


def _attention_factor(rope: _Rope, factor: float) -> float:
    """YaRN's temperature: given, or by the factor (arXiv 2309.00071, eq. 22), DeepSeek's multipliers."""

    def temperature(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.constants.get("attention_factor") is not None:
        return rope.number("attention_factor")
    numerator, denominator = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if numerator and denominator:
        return temperature(numerator) / temperature(denominator)
    return temperature(1.0)


def _llama3(rope: _Rope) -> _Scaled:
    """Wavelengths beyond length/low divided by the factor, within length/high kept, between blended."""
    factor, length = _factor(rope), rope.number("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise ValueError(
            f"rope_scaling.high_freq_factor: got {high}, expected more than low_freq_factor = {low}"
        )
    plain = rope.plain()
    rotations = length * plain / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * plain / factor + kept * plain, 1.0


def _factor(rope: _Rope) -> float:
    factor = rope.number("factor")
    if factor < 1:
        raise ValueError(f"rope_scaling.factor: got {factor}, expected at least 1")
    return factor


_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_STRETCH_KEYS = frozenset({"factor", "original_max_position_embeddings"})
_YARN_KEYS = _STRETCH_KEYS | {
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
_LLAMA3_KEYS = _STRETCH_KEYS | {"low_freq_factor", "high_freq_factor"}
_KINDS: dict[str, tuple[Callable[[_Rope], _Scaled], frozenset[str]]] = {
    "default": (_default, frozenset()),
    "linear": (_linear, frozenset({"factor"})),
    "dynamic": (_dynamic, frozenset({"factor"})),
    "yarn": (_yarn, _YARN_KEYS),
    "llama3": (_llama3, _LLAMA3_KEYS),
}
