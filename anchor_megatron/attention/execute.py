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

from anchor_megatron.attention.exchange import start_exchange, start_exchange_adjoint
from anchor_megatron.attention.kernels import Kernel
from anchor_megatron.attention.plan_tensors import PlanTensors
from anchor_megatron.attention.ring import ring_attention
from anchor_megatron.attention.rows import add_home, gather_keys
from anchor_megatron.attention.ulysses import ulysses_attention

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

    All ranks of `group` must call it together, each with its own plan of the same placement. A plan with
    rounds is executed as `ring.py` or `ulysses.py` says.
    """
    if plan.rounds or plan.whole is not None:
        attend = ring_attention if plan.rounds else ulysses_attention
        return attend(q_TNH, k_TGH, v_TGH, plan=plan, kernel=kernel, scale=scale, group=group)
    return _PlannedAttention.apply(q_TNH, k_TGH, v_TGH, plan, kernel, scale, group)


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
        out = q.new_empty(q.shape)
        lse_local = lse_waiting = None
        flight = start_exchange(k, v, plan, group)
        if n:
            lse_local = kernel.forward(q[:n], k[:n], v[:n], plan.local_segments, scale=scale, out_TNH=out[:n])
        received = flight.finish()
        if n < q.shape[0]:
            keys, values = gather_keys(k, v, received, plan)
            lse_waiting = kernel.forward(
                q[n:], keys, values, plan.waiting_segments, scale=scale, out_TNH=out[n:]
            )
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
        dkeys, dvalues = (k.new_empty((plan.key_index.numel(), *k.shape[1:])) for _ in range(2))
        if n < q.shape[0]:
            keys, values = gather_keys(k, v, received, plan)
            tensors = (dout[n:], q[n:], keys, values, out[n:], lse_waiting)
            kernel.backward(*tensors, plan.waiting_segments, scale=scale, into=(dq[n:], dkeys, dvalues))
        flight = start_exchange_adjoint(dkeys, dvalues, plan, ctx.group)
        if n:
            tensors = (dout[:n], q[:n], k[:n], v[:n], out[:n], lse_local)
            kernel.backward(*tensors, plan.local_segments, scale=scale, into=(dq[:n], dk[:n], dv[:n]))
        arrived = flight.finish()
        if plan.key_index.numel() or plan.sent_tokens:
            add_home(dk, dv, dkeys, dvalues, arrived, plan)
        return dq, dk, dv, None, None, None, None
