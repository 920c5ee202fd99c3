"""All measurements of one report, on one machine: what is measured on what, and in which order.

The results are plain numbers: {"settings": ..., "shift": [row, ...], "length": ..., "logit": ..., "modes":
..., "kernel": ..., "rope": ..., "layers": ...}. `findings` and `report` read nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchor_megatron.precision.attention import Vectors
from anchor_megatron.precision.experiments import Row, length_test, logit_test, mode_test, shift_test
from anchor_megatron.precision.implementations import kernel_test, rope_test
from anchor_megatron.precision.model import Probe, model_shift_test
from anchor_megatron.precision.rope import Rope, published_ropes, te_kernel_ropes
from anchor_megatron.precision.vectors import random_vectors, sink_vectors

__all__ = ["Settings", "Subject", "measure"]

HEAD_DIM, ROTARY_BASE = 128, 5e5  # Llama-3-8B's; of the seeded vectors
_NEAR_HEADS, _FAR_HEADS = 8, 4  # each with keys of its own
_MODEL_LAYERS = 4  # whose own queries and keys go through the modes
_LOOKED_AT = ("fp32", "transformers", "ours")  # where all implementations would be too many lines


@dataclass(frozen=True)
class Settings:
    """How far and how fine. Positions and lengths in tokens."""

    reference: int = 16
    shifts: tuple[int, ...] = (0, 1, 100, 1_000, 10_000, 100_000, 1_000_000)
    length: int = 2048
    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 131_072)
    distances: tuple[int, ...] = (1, 16, 256, 1024, 4096, 16_384, 65_536, 131_072)
    offsets: tuple[int, ...] = (0, 1_000, 10_000, 131_072)
    positions: tuple[int, ...] = (4096, 32_768, 131_072, 1_048_576, 4_194_304)
    kernel_lengths: tuple[int, ...] = (512, 2048)
    rows: int = 64
    far_rows: int = 16  # queries looked at in sequences of `lengths`
    seed: int = 0

    @classmethod
    def up_to(cls, length: int, *, seed: int) -> Settings:
        """The defaults with sequences, distances and offsets up to `length`; ValueError below 2,048."""
        if length < 2048:
            raise ValueError(f"length: got {length}, expected at least 2048")

        def cut(defaults: tuple[int, ...]) -> tuple[int, ...]:
            return (*(value for value in defaults if value < length), length)

        return cls(
            lengths=cut(cls.lengths), distances=cut(cls.distances), offsets=cut(cls.offsets), seed=seed
        )


@dataclass(frozen=True)
class Subject:
    """A model to measure: `probe` around it, `tokens` int64 [T] for it, `name` in tables, `title` in
    words.
    """

    name: str
    title: str
    probe: Probe
    tokens: Tensor


def measure(
    subjects: Sequence[Subject],
    settings: Settings,
    *,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything, on `device`; see the file's opening."""
    ropes = (*published_ropes(), *te_kernel_ropes())
    results: dict[str, Any] = dict(
        settings=asdict(settings),
        head_dim=HEAD_DIM,
        rotary_base=ROTARY_BASE,
        ropes={rope.name: rope.title for rope in ropes},
    )
    _measure_vectors(results, ropes, settings, device, say)
    results["layers"], results["models"] = [], {}
    for subject in subjects:
        say(f"{subject.title}")
        results["models"][subject.name] = subject.title
        _measure_model(results, subject, ropes, settings)
    return results


def _measure_vectors(
    results: dict[str, Any],
    ropes: Sequence[Rope],
    settings: Settings,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Fills the tables with what random vectors, with and without a sink, show."""
    exponents = np.arange(0, HEAD_DIM, 2, dtype=np.float64) / HEAD_DIM
    frequencies = torch.from_numpy(ROTARY_BASE**-exponents)
    span = max(settings.lengths)
    far, near = (
        random_vectors(length, frequencies, heads=heads, groups=heads, seed=settings.seed, device=device)
        for length, heads in ((span, _FAR_HEADS), (settings.length, _NEAR_HEADS))
    )
    say("turned vectors by implementation")
    results["rope"] = rope_test(near, ropes, positions=settings.positions)
    both = (near, sink_vectors(near, span=span))
    say("shift of positions, seeded vectors")
    results["shift"] = [row for one in both for row in _shift(one, ropes, settings)]
    say(f"lengths up to {max(settings.lengths):,}")
    looked_at = [rope for rope in ropes if rope.name in _LOOKED_AT]
    options: dict[str, Any] = dict(
        reference=settings.reference, shift=100_000, lengths=settings.lengths, rows=settings.far_rows
    )
    far_both = (far, sink_vectors(far, span=span))
    results["length"] = [row for one in far_both for row in length_test(one, looked_at, **options)]
    say("the first token's score by distance")
    results["logit"] = [row for one in both for row in _logit(one, ropes, settings)]
    say("modes")
    results["modes"] = [row for one in both for row in _modes(one, looked_at, settings)]
    say("the attention kernel")
    halves = [rope for rope in ropes if rope.dtype == torch.bfloat16 and rope.name != "megatron"]
    options = dict(reference=settings.reference, shift=100_000, lengths=settings.kernel_lengths)
    results["kernel"] = [row for one in far_both for row in kernel_test(one, halves, **options)]


def _measure_model(
    results: dict[str, Any], subject: Subject, ropes: Sequence[Rope], settings: Settings
) -> None:
    """Adds a model's rows to every table that has room for them."""
    chosen = [rope for rope in ropes if rope.name not in ("megatron", "ours_unfused")]
    options: dict[str, Any] = dict(
        name=subject.name, reference=settings.reference, shifts=settings.shifts, rows=settings.rows
    )
    results["layers"] += model_shift_test(subject.probe, subject.tokens, chosen, **options)
    eager = [rope for rope in chosen if rope.name == "transformers"]
    results["layers"] += model_shift_test(subject.probe, subject.tokens, eager, arithmetic="eager", **options)
    exact = next(rope for rope in ropes if rope.name == "fp32")
    layers = subject.probe.vectors(subject.tokens, exact, name=subject.name)
    picked = np.unique(np.linspace(0, len(layers) - 1, min(_MODEL_LAYERS, len(layers))).astype(int))
    looked_at = [rope for rope in ropes if rope.name in _LOOKED_AT]
    for layer in picked:
        results["logit"] += _logit(layers[layer], looked_at, settings)
        results["modes"] += _modes(layers[layer], looked_at, settings)


def _shift(vectors: Vectors, ropes: Sequence[Rope], settings: Settings) -> list[Row]:
    options: dict[str, Any] = dict(reference=settings.reference, shifts=settings.shifts, rows=settings.rows)
    eager = [rope for rope in ropes if rope.name == "transformers"]
    return [
        *shift_test(vectors, ropes, **options),
        *shift_test(vectors, eager, arithmetic="eager", **options),
    ]


def _logit(vectors: Vectors, ropes: Sequence[Rope], settings: Settings) -> list[Row]:
    return logit_test(
        vectors, ropes, distances=settings.distances, shift=settings.reference, rows=settings.rows
    )


def _modes(vectors: Vectors, ropes: Sequence[Rope], settings: Settings) -> list[Row]:
    return mode_test(vectors, ropes, offsets=settings.offsets, rows=settings.rows)
