"""Queries and keys to measure on when there is no model: seeded random ones, with or without an attention
sink.

Random vectors spread attention evenly. Trained models do not: much of it goes to the first token, because
queries share a direction that the first key points in. `sink_vectors` plants that: a common direction u, in
pairs that hardly turn within the sequence, is added to every query and to the first key, so that this key's
weight is about one half at any distance up to the length.

Legend: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from anchor_megatron.precision.attention import Vectors

__all__ = ["random_vectors", "sink_vectors"]

_STILL = 0.3  # radians; pairs that turn less within the sequence carry the sink


def random_vectors(
    length: int,
    frequencies: Tensor,
    *,
    heads: int = 8,
    groups: int = 2,
    seed: int = 0,
    device: torch.device | None = None,
) -> Vectors:
    """Normal deviates rounded to BF16, the same on every device; `frequencies` fp64 [H/2]."""
    generator = torch.Generator().manual_seed(seed)
    head_dim = 2 * frequencies.numel()
    q_TNH, k_TGH = (
        torch.randn(length, count, head_dim, generator=generator).bfloat16().to(device)
        for count in (heads, groups)
    )
    return Vectors("random", q_TNH, k_TGH, frequencies.to(device), head_dim**-0.5)


def sink_vectors(vectors: Vectors, *, span: int) -> Vectors:
    """`vectors` with a sink planted in the first key, for distances up to `span`."""
    still = vectors.frequencies * span < _STILL
    if not bool(still.any()):  # a small rotary base: the slowest pair has to do
        still[-1] = True
    count = int(still.sum())
    length = vectors.k_TGH.shape[0]
    # random scores have variance 1, so the others' exponentials add up to length * exp(1/2)
    gain = math.sqrt((math.log(length) + 0.5) / vectors.scale)
    direction = (still.float() * gain / math.sqrt(count)).repeat(2) * math.sqrt(0.5)
    q_TNH = (vectors.q_TNH.float() + direction).bfloat16()
    k_TGH = vectors.k_TGH.clone()
    k_TGH[0] = (k_TGH[0].float() + direction).bfloat16()
    return replace(vectors, name="sink", q_TNH=q_TNH, k_TGH=k_TGH)
