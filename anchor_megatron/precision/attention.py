"""Attention weights of a few query rows, and how two sets of them differ.

The weights of one query sum to 1. If two computations that should agree give (0.7, 0.2, 0.1) and (0.6, 0.2,
0.2), their difference D is 0.1 + 0 + 0.1 = 0.2, of which the first key has a share of one half. D lies
between 0 (the same) and 2 (nothing in common); half of D is the attention that went elsewhere. arXiv
2411.13476 (section 3) sums the same quantity over all queries; here it is the mean over the queries looked
at, so that lengths compare.

Rows are chosen because a full matrix of 131,072 tokens has 17 billion entries.

Legend: T keys, R query rows, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchor_megatron.precision.rope import Rope

__all__ = [
    "ARITHMETICS",
    "Difference",
    "Vectors",
    "attention_scores",
    "attention_weights",
    "compare",
    "spread_rows",
    "weights_of",
]

ARITHMETICS = ("fused", "eager")


@dataclass(frozen=True)
class Vectors:
    """Queries and keys of one layer before the embedding, in token order; token 0 is the sequence's first.

    Values are BF16 numbers whatever their type, so that every implementation starts from the same ones.
    q_TNH, k_TGH; frequencies fp64 [H/2], radians a token; scale multiplies the scores.
    """

    name: str
    q_TNH: Tensor
    k_TGH: Tensor
    frequencies: Tensor
    scale: float


@dataclass(frozen=True)
class Difference:
    """per_key fp64 [T]: |difference| of a query's weight on each key, mean over queries and heads."""

    per_key: Tensor

    @property
    def total(self) -> float:
        """D of a query, from 0 to 2."""
        return float(self.per_key.sum())

    @property
    def first_share(self) -> float:
        """The first key's part of D; NaN where there is no difference."""
        return float(self.per_key[0] / self.per_key.sum())


def attention_scores(q_RNH: Tensor, k_TGH: Tensor, rows_R: Tensor, *, scale: float) -> Tensor:
    """Causal scores [N, R, T] of the queries at indices `rows_R`, FP32 (FP64 for FP64 inputs), -inf for keys
    behind.
    """
    wide = torch.promote_types(q_RNH.dtype, torch.float32)
    repeats = q_RNH.shape[1] // k_TGH.shape[1]
    q_GARH = q_RNH.to(wide).unflatten(1, (-1, repeats)).permute(1, 2, 0, 3)
    scores = q_GARH.flatten(1, 2) @ k_TGH.to(wide).permute(1, 2, 0)  # [G, A*R, T]: A query heads share a key
    scores_NRT = scores.unflatten(1, (repeats, -1)).flatten(0, 1) * scale
    hidden = torch.arange(k_TGH.shape[0], device=rows_R.device)[None] > rows_R[:, None]
    return scores_NRT.masked_fill_(hidden, float("-inf"))


def attention_weights(
    q_RNH: Tensor, k_TGH: Tensor, rows_R: Tensor, *, scale: float, arithmetic: str = "fused"
) -> Tensor:
    """Causal attention weights [N, R, T] of the queries at indices `rows_R`, FP32 (FP64 for FP64 inputs).

    arithmetic: "fused" keeps scores and weights in FP32, as flash attention does; "eager" rounds both to the
    inputs' type, as attention written as two matrix products does.
    """
    assert arithmetic in ARITHMETICS, f"got {arithmetic!r}, expected one of {ARITHMETICS}"
    scores_NRT = attention_scores(q_RNH, k_TGH, rows_R, scale=scale)
    if arithmetic == "fused":
        return scores_NRT.softmax(dim=-1)
    rounded = scores_NRT.to(q_RNH.dtype).to(scores_NRT.dtype).softmax(dim=-1)
    return rounded.to(q_RNH.dtype).to(scores_NRT.dtype)


def weights_of(
    vectors: Vectors, rope: Rope, positions_T: Tensor, rows_R: Tensor, *, arithmetic: str = "fused"
) -> Tensor:
    """Attention weights [N, R, T] of `vectors` at `positions_T` by an implementation of the embedding."""
    q_RNH = rope(vectors.q_TNH[rows_R], positions_T[rows_R], vectors.frequencies)
    k_TGH = rope(vectors.k_TGH, positions_T, vectors.frequencies)
    return attention_weights(q_RNH, k_TGH, rows_R, scale=vectors.scale, arithmetic=arithmetic)


def compare(one_NRT: Tensor, other_NRT: Tensor) -> Difference:
    """The difference of two sets of weights of the same queries."""
    wide = torch.promote_types(one_NRT.dtype, other_NRT.dtype)
    return Difference((one_NRT.to(wide) - other_NRT.to(wide)).abs().mean(dim=(0, 1), dtype=torch.float64))


def spread_rows(length: int, count: int, device: torch.device | None = None) -> Tensor:
    """Indices int64 of `count` queries (all of them if fewer), evenly spread, the last token's among them."""
    count = min(count, length)
    return (torch.arange(1, count + 1, device=device) * length) // count - 1
