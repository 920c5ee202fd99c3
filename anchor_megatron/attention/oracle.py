"""Attention by its definition: every query against every key, a mask, a softmax. Slow, differentiable, in any
precision.

Legend: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_attention"]


def dense_attention(
    q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, visible_TT: Tensor, *, scale: float
) -> Tensor:
    """softmax(scale * q k^T, over the keys that `visible_TT` [query, key] (bool) allows) v, shape [T, N, H],
    dtype of q.
    """
    repeats = q_TNH.shape[1] // k_TGH.shape[1]
    k_TNH, v_TNH = (x.repeat_interleave(repeats, dim=1) for x in (k_TGH, v_TGH))
    scores_NTT = torch.einsum("qnh,knh->nqk", q_TNH, k_TNH) * scale
    weights_NTT = scores_NTT.masked_fill(~visible_TT, float("-inf")).softmax(dim=-1)
    return torch.einsum("nqk,knh->qnh", weights_NTT, v_TNH)
