"""Attention kernels behind one signature: packed documents, causal inside each, aligned to the bottom right.

`Segments` says where the documents lie: queries [cu_seqlens_q[i], cu_seqlens_q[i+1]) see keys from
cu_seqlens_k[i] on, the last query all of them, each earlier query one fewer. Three queries against five keys:

    query 0: k0 k1 k2 .  .
    query 1: k0 k1 k2 k3 .
    query 2: k0 k1 k2 k3 k4

A kernel is a pair of functions. `forward` returns the output and the natural logarithm of the softmax's
denominator (log-sum-exp of the scaled scores); `backward` takes both again. Results are written where the
caller wants them: a plan's local and waiting pieces are slices of one tensor, and nothing is copied to bring
them together.

Legend: T query rows, K key rows, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Kernel", "Segments"]


@dataclass(frozen=True)
class Segments:
    """Document borders of packed queries and keys: int32 tensors [documents + 1], and the longest of each."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Kernel(Protocol):
    """One attention back end."""

    name: str

    @staticmethod
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run on `device` with these tensors; None where it can."""
        ...

    def forward(
        self,
        q_TNH: Tensor,
        k_KGH: Tensor,
        v_KGH: Tensor,
        segments: Segments,
        *,
        scale: float,
        out_TNH: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """Writes the output into `out_TNH` (dtype of q); returns the log-sum-exp [N, T] (fp32, or fp64 for
        fp64 inputs). causal=False: every query sees all keys of its document.
        """
        ...

    def backward(
        self,
        dout_TNH: Tensor,
        q_TNH: Tensor,
        k_KGH: Tensor,
        v_KGH: Tensor,
        out_TNH: Tensor,
        lse_NT: Tensor,
        segments: Segments,
        *,
        scale: float,
        into: tuple[Tensor, Tensor, Tensor],
        causal: bool = True,
    ) -> None:
        """Writes dq [T, N, H], dk [K, G, H] and dv [K, G, H] (the inputs' dtype) into the tensors `into`."""
        ...
