"""Walks a plan: attend the local pieces while keys fly, then the pieces that waited; backward in mirror
image.

    forward    start exchange | local pieces      | finish | waiting pieces
    backward   waiting pieces | start adjoint     | local pieces | finish, add to the rows that were sent

A rank's rows are ordered local pieces first, waiting pieces behind, so both outputs are slices of one tensor.
Every query row meets all its keys in one kernel call, in document order: nothing is merged, and the result
does not depend on the number of ranks.

Legend: T rows of this rank, N query heads, G key/value heads, H head dim, R received rows, K gathered keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.exchange import InFlight, start_exchange, start_exchange_adjoint
from anchor_megatron.attention.kernels import Kernel, Segments
from anchor_megatron.attention.plan_tensors import PlanTensors

__all__ = ["planned_attention"]


def planned_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    *,
    plan: PlanTensors,
    kernel: Kernel,
    scale: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Attention of this rank's rows, [T, N, H] in q's dtype. `group` holds the context-parallel ranks, in
    rank order.

    All ranks of `group` must call it together, each with its own plan of the same placement.
    """
    return _PlannedAttention.apply(q_TNH, k_TGH, v_TGH, plan, kernel, scale, group)


def _local(plan: PlanTensors) -> Segments:
    ends, longest = plan.cu_seqlens_local, plan.max_seqlen_local
    return Segments(ends, ends, longest, longest)


def _waiting(plan: PlanTensors) -> Segments:
    return Segments(plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k)


class _PlannedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: PlanTensors,
        kernel: Kernel,
        scale: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        n = plan.local_tokens
        out = torch.empty_like(q)
        lse_local = lse_waiting = received = None
        flight = _start(k, v, plan, group)
        if n:
            lse_local = kernel.forward(q[:n], k[:n], v[:n], _local(plan), scale=scale, out_TNH=out[:n])
        if flight is not None:
            received = flight.finish()
        if n < q.shape[0]:
            keys, values = _gather(k, v, received, plan)
            lse_waiting = kernel.forward(q[n:], keys, values, _waiting(plan), scale=scale, out_TNH=out[n:])
        ctx.save_for_backward(q, k, v, out, lse_local, lse_waiting, received)
        ctx.plan, ctx.kernel, ctx.scale, ctx.group = plan, kernel, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_local, lse_waiting, received = ctx.saved_tensors
        plan, kernel, scale = ctx.plan, ctx.kernel, ctx.scale
        n = plan.local_tokens
        dout = grads[0].contiguous()
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        # rows: keys and values of this rank's tokens, then of the received ones; sums are kept in at least
        # fp32
        drows = torch.zeros(
            (k.shape[0] + plan.received_tokens, 2, *k.shape[1:]),
            dtype=torch.promote_types(k.dtype, torch.float32),
            device=k.device,
        )
        if n < q.shape[0]:
            keys, values = _gather(k, v, received, plan)
            into = (dq[n:], torch.empty_like(keys), torch.empty_like(values))
            tensors = (dout[n:], q[n:], keys, values, out[n:], lse_waiting)
            kernel.backward(*tensors, _waiting(plan), scale=scale, into=into)
            drows.index_add_(0, plan.key_index, torch.stack(into[1:], dim=1).to(drows.dtype))
        flight = _start_adjoint(drows[k.shape[0] :], k.dtype, plan, ctx.group)
        if n:
            tensors = (dout[:n], q[:n], k[:n], v[:n], out[:n], lse_local)
            kernel.backward(*tensors, _local(plan), scale=scale, into=(dq[:n], dk[:n], dv[:n]))
            drows[:n, 0] += dk[:n]
            drows[:n, 1] += dv[:n]
        if flight is not None:
            drows.index_add_(0, plan.send_index, flight.finish().to(drows.dtype))
        dk.copy_(drows[: k.shape[0], 0])
        dv.copy_(drows[: k.shape[0], 1])
        return dq, dk, dv, None, None, None, None


def _start(k: Tensor, v: Tensor, plan: PlanTensors, group: dist.ProcessGroup | None) -> InFlight | None:
    if len(plan.send_counts) == 1:
        return None
    assert group is not None, "a plan for several context-parallel ranks needs their process group"
    return start_exchange(k, v, plan, group)


def _start_adjoint(
    dreceived: Tensor, dtype: torch.dtype, plan: PlanTensors, group: dist.ProcessGroup | None
) -> InFlight | None:
    if len(plan.send_counts) == 1:
        return None
    assert group is not None, "a plan for several context-parallel ranks needs their process group"
    return start_exchange_adjoint(dreceived.to(dtype), plan, group)


def _gather(k: Tensor, v: Tensor, received: Tensor | None, plan: PlanTensors) -> tuple[Tensor, Tensor]:
    """Keys and values of the waiting pieces, in document order, [K, G, H] each."""
    if received is None or not received.shape[0]:
        return k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)
    rows_k, rows_v = torch.cat((k, received[:, 0])), torch.cat((v, received[:, 1]))
    return rows_k.index_select(0, plan.key_index), rows_v.index_select(0, plan.key_index)
