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

__all__ = ["Kernel", "Segments", "TorchCpuKernel", "choose_kernel"]


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

    def forward(
        self,
        q_TNH: Tensor,
        k_KGH: Tensor,
        v_KGH: Tensor,
        segments: Segments,
        *,
        scale: float,
        out_TNH: Tensor,
    ) -> Tensor:
        """Writes the output into `out_TNH` (dtype of q); returns the log-sum-exp [N, T] (fp32, or fp64 for
        fp64 inputs).
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
    ) -> None:
        """Writes dq [T, N, H], dk [K, G, H] and dv [K, G, H] (the inputs' dtype) into the tensors `into`."""
        ...


class TorchCpuKernel:
    """torch's flash attention for the CPU, one document at a time; fp64, fp32 and bf16, grouped heads."""

    name = "torch_cpu"

    def forward(
        self,
        q_TNH: Tensor,
        k_KGH: Tensor,
        v_KGH: Tensor,
        segments: Segments,
        *,
        scale: float,
        out_TNH: Tensor,
    ) -> Tensor:
        """See `Kernel.forward`."""
        lse_dtype = torch.promote_types(q_TNH.dtype, torch.float32)
        lse_NT = torch.empty(q_TNH.shape[1], q_TNH.shape[0], dtype=lse_dtype)
        for rows, keys in _documents(segments):
            query, key, value = _heads_first(q_TNH[rows], k_KGH[keys], v_KGH[keys])
            causal, mask = _mask(query, key)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, attn_mask=mask, scale=scale
            )
            out_TNH[rows] = out[0].transpose(0, 1)
            lse_NT[:, rows] = lse[0]
        return lse_NT

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
    ) -> None:
        """See `Kernel.backward`."""
        for rows, keys in _documents(segments):
            query, key, value = _heads_first(q_TNH[rows], k_KGH[keys], v_KGH[keys])
            causal, mask = _mask(query, key)
            dout, out = _heads_first(dout_TNH[rows], out_TNH[rows])
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, query, key, value, out, lse_NT[None, :, rows], 0.0, causal, attn_mask=mask, scale=scale
            )
            for grad, where, one in zip(into, (rows, keys, keys), found, strict=True):
                grad[where] = one[0].transpose(0, 1)


def choose_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel called `name` ("auto": the fastest for `device`); ValueError for one that does not exist
    there.
    """
    kernels = {"torch_cpu": TorchCpuKernel} if device.type == "cpu" else {}
    if name == "auto" and kernels:
        return next(iter(kernels.values()))()
    if name not in kernels:
        raise ValueError(
            f"attention.kernel: got {name!r} on {device.type}, expected auto or one of {', '.join(kernels)}"
        )
    return kernels[name]()


def _documents(segments: Segments) -> list[tuple[slice, slice]]:
    """Each document's query rows and key rows."""
    q_ends, k_ends = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    rows = [slice(*pair) for pair in zip(q_ends, q_ends[1:], strict=False)]
    keys = [slice(*pair) for pair in zip(k_ends, k_ends[1:], strict=False)]
    return list(zip(rows, keys, strict=True))


def _heads_first(*packed: Tensor) -> list[Tensor]:
    """[T, N, H] -> [1, N, T, H]."""
    return [x.transpose(0, 1)[None] for x in packed]


def _mask(query: Tensor, key: Tensor) -> tuple[bool, Tensor | None]:
    """torch's causal flag aligns top left: right for squares only, an additive mask for the rest."""
    rows, keys = query.shape[2], key.shape[2]
    if rows == keys:
        return True, None
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    return False, torch.zeros(rows, keys, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
