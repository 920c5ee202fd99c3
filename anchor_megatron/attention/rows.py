"""Rows of keys and values on the move: packed for sending, gathered for the pieces that wait, gradients
summed home.

A row can serve as a key several times: in its own piece, in waiting pieces of this rank, on other ranks. So
gathering copies a row to several places, and its adjoint sums what comes back from them. The sums follow a
list made on the host (`PlanTensors.gradient_offsets` and `gradient_sources`: for every row, where its
gradients lie), so they are one pass, take no atomics and come out the same bit for bit every time. On a GPU
each function is one fused kernel (`rows_triton.py`).

Legend: T rows of this rank, R received rows, K gathered keys, S sent rows, G key/value heads, H head dim; W
rows of outputs, of which Q are mixed with others, N query heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anchor_megatron.attention.plan_tensors import PlanTensors

__all__ = ["add_home", "gather_keys", "mix_rows", "pack_rows", "sum_received"]


def pack_rows(
    k_TGH: Tensor, v_TGH: Tensor, received_R2GH: Tensor, index_S: Tensor, *, out_S2GH: Tensor
) -> None:
    """Writes keys and values of rows that other ranks need, own ones or received ones behind them."""
    if k_TGH.is_cuda:
        _triton().pack_rows(k_TGH, v_TGH, received_R2GH, index_S, out_S2GH)
        return
    for i, own in enumerate((k_TGH, v_TGH)):
        out_S2GH[:, i] = torch.cat((own, received_R2GH[:, i])).index_select(0, index_S)


def gather_keys(
    k_TGH: Tensor, v_TGH: Tensor, received_R2GH: Tensor, plan: PlanTensors
) -> tuple[Tensor, Tensor]:
    """Keys and values [K, G, H] of the waiting pieces, each piece's in document order."""
    if k_TGH.is_cuda:
        return _triton().gather_keys(k_TGH, v_TGH, received_R2GH, plan.key_index)
    rows = (torch.cat((x, received_R2GH[:, i])) for i, x in enumerate((k_TGH, v_TGH)))
    keys, values = (x.index_select(0, plan.key_index) for x in rows)
    return keys, values


def sum_received(
    dkeys_KGH: Tensor,
    dvalues_KGH: Tensor,
    arrived_S2GH: Tensor,
    offsets: Tensor,
    plan: PlanTensors,
    *,
    out_R2GH: Tensor,
) -> None:
    """Writes gradients of received rows, a slice of `plan.gradient_offsets`: the sum over the places they
    were gathered to (`dkeys`, `dvalues`) and the ranks they were handed to (`arrived`), in fp32 at least.
    """
    if dkeys_KGH.is_cuda:
        _triton().sum_received(dkeys_KGH, dvalues_KGH, arrived_S2GH, offsets, plan.gradient_sources, out_R2GH)
        return
    sources = torch.cat((torch.stack((dkeys_KGH, dvalues_KGH), dim=1), arrived_S2GH))
    out_R2GH.copy_(_sum_segments(sources, offsets, plan.gradient_sources))


def add_home(
    dk_TGH: Tensor,
    dv_TGH: Tensor,
    dkeys_KGH: Tensor,
    dvalues_KGH: Tensor,
    arrived_S2GH: Tensor,
    plan: PlanTensors,
) -> None:
    """Completes this rank's gradients in place: rows below `plan.local_tokens` hold the local pieces' share
    already.

    Adds to each row what the waiting pieces (`dkeys`, `dvalues`) and the other ranks (`arrived`, in
    `send_index`'s order) computed for it. Sums in fp32 at least.
    """
    offsets = plan.gradient_offsets[: dk_TGH.shape[0] + 1]
    if dk_TGH.is_cuda:
        gradients = (dkeys_KGH, dvalues_KGH, arrived_S2GH)
        _triton().add_home(dk_TGH, dv_TGH, *gradients, offsets, plan.gradient_sources, plan.local_tokens)
        return
    sources = torch.cat((torch.stack((dkeys_KGH, dvalues_KGH), dim=1), arrived_S2GH))
    total = _sum_segments(sources, offsets, plan.gradient_sources)
    for i, own in enumerate((dk_TGH, dv_TGH)):
        total[: plan.local_tokens, i] += own[: plan.local_tokens]
        own.copy_(total[:, i])


def mix_rows(
    out_WNH: Tensor, part_QNH: Tensor, index_Q: Tensor | None, *, keep_NQ: Tensor, new_NQ: Tensor
) -> None:
    """Makes rows `index` of `out` (None: all of them, in order) `keep` times what they were and `new` times
    `part`; `out` and the shares are fp32 at least.
    """
    if out_WNH.is_cuda:
        _triton().mix_rows(out_WNH, part_QNH, index_Q, keep_NQ, new_NQ)
        return
    index = slice(None) if index_Q is None else index_Q.long()
    keep, new = (shares.T[..., None] for shares in (keep_NQ, new_NQ))
    out_WNH[index] = out_WNH[index] * keep + part_QNH * new


def _sum_segments(values: Tensor, offsets: Tensor, sources: Tensor) -> Tensor:
    """Row i: the sum of values[sources[offsets[i] : offsets[i+1]]]."""
    rows = torch.arange(offsets.numel() - 1).repeat_interleave(offsets.diff().long())
    wide = torch.promote_types(values.dtype, torch.float32)
    total = torch.zeros((offsets.numel() - 1, *values.shape[1:]), dtype=wide)
    return total.index_add_(0, rows, values.index_select(0, sources[offsets[0] : offsets[-1]]).to(wide))


def _triton() -> Any:
    from anchor_megatron.attention import rows_triton  # Triton is there only where a GPU is

    return rows_triton
