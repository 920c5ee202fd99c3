"""Walks a plan: attend the local pieces while keys fly, then the pieces that waited; backward in mirror
image.

    forward    start exchange | local pieces      | finish | waiting pieces
    backward   waiting pieces | start adjoint     | local pieces | finish, add to the rows that were sent

Where the plan says so, heads travel in parts (`layout/overlap.py`): transfers start one behind the other, and
waiting pieces of one part's heads run under the next part's transfer.

A rank's rows are ordered local pieces first, waiting pieces behind, so both outputs are slices of one tensor.
Every query row meets all its keys in one kernel call, in document order: nothing is merged, and the result
does not depend on the number of ranks.

Legend: T rows of this rank, N query heads, G key/value heads, H head dim, R received rows, K gathered keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        n, parts = plan.local_tokens, _head_parts(q, k, plan.head_parts[0])
        out, lse_local = q.new_empty(q.shape), None
        flights = [start_exchange(k[:, at], v[:, at], plan, group) for _, at in parts]
        if n:
            lse_local = kernel.forward(q[:n], k[:n], v[:n], plan.local_segments, scale=scale, out_TNH=out[:n])
        of_parts = []  # what arrived, and log-sum-exps
        for (heads, at), flight in zip(parts, flights, strict=True):
            received, lse = flight.finish(), q.new_empty((heads.stop - heads.start, 0))
            if n < q.shape[0]:
                keys, values = gather_keys(k[:, at], v[:, at], received, plan)
                lse = kernel.forward(
                    q[n:, heads], keys, values, plan.waiting_segments, scale=scale, out_TNH=out[n:, heads]
                )
            of_parts += [received, lse]
        ctx.save_for_backward(q, k, v, out, lse_local, *of_parts)
        ctx.plan, ctx.kernel, ctx.scale, ctx.group = plan, kernel, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_local, *of_parts = ctx.saved_tensors
        plan, kernel, scale = ctx.plan, ctx.kernel, ctx.scale
        n, dout = plan.local_tokens, grads[0].contiguous()
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        homeward = []
        for (heads, at), received, lse in _in_parts(_head_parts(q, k, plan.head_parts[1]), of_parts):
            own = k[:, at]
            dkeys, dvalues = (k.new_empty((plan.key_index.numel(), *own.shape[1:])) for _ in range(2))
            if n < q.shape[0]:
                keys, values = gather_keys(own, v[:, at], received, plan)
                tensors = (dout[n:, heads], q[n:, heads], keys, values, out[n:, heads], lse)
                into = (dq[n:, heads], dkeys, dvalues)
                kernel.backward(*tensors, plan.waiting_segments, scale=scale, into=into)
            homeward.append((at, dkeys, dvalues, start_exchange_adjoint(dkeys, dvalues, plan, ctx.group)))
        if n:
            tensors = (dout[:n], q[:n], k[:n], v[:n], out[:n], lse_local)
            kernel.backward(*tensors, plan.local_segments, scale=scale, into=(dq[:n], dk[:n], dv[:n]))
        for at, dkeys, dvalues, flight in homeward:
            arrived = flight.finish()
            if plan.key_index.numel() or plan.sent_tokens:
                add_home(dk[:, at], dv[:, at], dkeys, dvalues, arrived, plan)
        return dq, dk, dv, None, None, None, None


Part = tuple[slice, slice]  # query heads, and the key/value heads that they read


def _head_parts(q: Tensor, k: Tensor, count: int) -> list[Part]:
    """The heads in so many parts. A plan counts parts for the heads that its cost model knows; of others
    there are as many as divide them.
    """
    parts = math.gcd(count, k.shape[1])
    sizes = (q.shape[1] // parts, k.shape[1] // parts)
    return [
        (slice(i * sizes[0], (i + 1) * sizes[0]), slice(i * sizes[1], (i + 1) * sizes[1]))
        for i in range(parts)
    ]


def _in_parts(parts: list[Part], coarser: list[Tensor]) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Each part with its heads of what arrived [R, 2, G, H] and of log-sum-exps [N, W], which were kept in as
    many parts or fewer.
    """
    pairs = list(zip(coarser[::2], coarser[1::2], strict=True))
    each = len(parts) // len(pairs)
    for number, part in enumerate(parts):
        received, lse = pairs[number // each]
        yield part, received.chunk(each, dim=2)[number % each].contiguous(), lse.chunk(each)[number % each]
