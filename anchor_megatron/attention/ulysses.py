"""Attention by an exchange over heads (DeepSpeed-Ulysses, arXiv 2309.14509), on any placement.

    forward    rows of all heads -> all tokens of own heads | one kernel call on whole documents | back
    backward   the output's gradient there | one kernel call | gradients of q, k, v back

An all-to-all gives each of C ranks all tokens for N/C of the query heads, with the key/value heads that those
read. With 8 query heads, 2 key/value heads and 4 ranks a rank has 2 query heads and 1 key/value head, which
two ranks receive; where a rank's query heads share key/value heads unevenly, a key/value head is sent once
for every run of query heads that reads it:

    run of query heads u = gcd(N/C, N/G)      key/value heads of a rank m = N/C / u, each read by u of its own

The kernel sees whole documents, so the output equals one rank's bit for bit. What a rank holds while it
attends is as large as its own rows; only the window's length is bounded by memory, as each key/value head
that a rank has is there for all tokens.

Legend: T rows of this rank, S tokens of the micro-batch = C * T, C ranks, N query heads, n = N/C, G key/value
heads, m of a rank, H head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.kernels import Kernel, Segments
from anchor_megatron.attention.plan_tensors import PlanTensors, WholeTensors

__all__ = ["ulysses_attention"]


def ulysses_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    *,
    plan: PlanTensors,
    kernel: Kernel,
    scale: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Attention of this rank's rows, [T, N, H] in q's dtype. All ranks of `group` must call it together.

    ValueError where the ranks do not divide the query heads.
    """
    ranks = len(plan.send_counts)
    if q_TNH.shape[1] % ranks:
        raise ValueError(
            f"exchange ulysses: got {q_TNH.shape[1]} query heads, expected a multiple of the {ranks} ranks"
        )
    return _UlyssesAttention.apply(q_TNH, k_TGH, v_TGH, plan, kernel, scale, group)


class _UlyssesAttention(torch.autograd.Function):
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
        heads = _Heads(q, k, plan, group)
        query, key, value = heads.to_whole(q, heads.spread(k), heads.spread(v))
        out = torch.empty_like(query)
        lse = kernel.forward(query, key, value, heads.whole.segments, scale=scale, out_TNH=out)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.heads, ctx.kernel, ctx.scale = heads, kernel, scale
        (rows,) = heads.to_rows(out)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        heads: _Heads = ctx.heads
        (dout,) = heads.to_whole(grads[0])
        into = tuple(torch.empty_like(x) for x in (query, key, value))
        segments: Segments = heads.whole.segments
        ctx.kernel.backward(dout, query, key, value, out, lse, segments, scale=ctx.scale, into=into)
        dq, dk, dv = heads.to_rows(*into)
        return dq, heads.gather(dk), heads.gather(dv), None, None, None, None


class _Heads:
    """Moves tensors between the two divisions: rows of all heads, heads of all tokens.

    Each tensor travels alone, while the next is packed and the one before laid out; a rank's own part does
    not travel. Parts lie in the order of `Whole`: the other ranks', then this rank's.
    """

    def __init__(self, q: Tensor, k: Tensor, plan: PlanTensors, group: dist.ProcessGroup | None) -> None:
        assert plan.whole is not None and group is not None, "the plan was made for another exchange"
        self.whole: WholeTensors = plan.whole
        self.ranks, self.rank, self.group = len(plan.send_counts), dist.get_rank(group), group
        self.groups = k.shape[1]
        run = math.gcd(q.shape[1] // self.ranks, q.shape[1] // self.groups)
        self.copies = q.shape[1] // run // self.groups  # of every key/value head, neighbours in what is sent

    def spread(self, x_TGH: Tensor) -> Tensor:
        """Key/value heads [T, C * m, H] as the ranks read them. Its adjoint is `gather`."""
        return x_TGH if self.copies == 1 else x_TGH.repeat_interleave(self.copies, dim=1)

    def gather(self, dx: Tensor) -> Tensor:
        """Sums the copies' gradients [T, C * m, H] to [T, G, H], in fp32 at least."""
        if self.copies == 1:
            return dx
        wide = torch.promote_types(dx.dtype, torch.float32)
        return dx.unflatten(1, (self.groups, self.copies)).sum(dim=2, dtype=wide).to(dx.dtype)

    def to_whole(self, *tensors: Tensor) -> list[Tensor]:
        """[T, C * h, H] each to [S, h, H], tokens in the window's order. Its adjoint is `to_rows`."""
        flights = []
        for x in tensors:
            *others, own = self._own_last(x.unflatten(1, (self.ranks, -1)).unbind(1))
            arrived = x.new_empty((self.ranks, *own.shape))
            arrived[-1] = own
            flights.append((arrived, self._start(torch.stack(others), arrived[:-1])))
        return [
            _landed(arrived, work).flatten(0, 1).index_select(0, self.whole.to_tokens)
            for arrived, work in flights
        ]

    def to_rows(self, *tensors: Tensor) -> list[Tensor]:
        """[S, h, H] each back to this rank's rows [T, C * h, H]."""
        flights = []
        for x in tensors:
            rows = x.index_select(0, self.whole.to_rows).unflatten(0, (self.ranks, -1))
            arrived = torch.empty_like(rows[:-1])
            flights.append((rows, arrived, self._start(rows[:-1], arrived)))
        found = []
        for rows, arrived, work in flights:
            parts = [*_landed(arrived, work).unbind(0)]
            parts.insert(self.rank, rows[-1])
            found.append(torch.cat(parts, dim=1))
        return found

    def _own_last(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        return [*parts[: self.rank], *parts[self.rank + 1 :], parts[self.rank]]

    def _start(self, leaving: Tensor, arriving: Tensor) -> tuple[dist.Work, Tensor]:
        """Starts an all-to-all of equal parts [C - 1, ...], which is its own adjoint."""
        counts = [1] * self.ranks
        counts[self.rank] = 0
        work = dist.all_to_all_single(arriving, leaving, counts, counts, group=self.group, async_op=True)
        assert work is not None, "an asynchronous collective on a member of the group"
        return work, leaving  # which must live until it has left


def _landed(arrived: Tensor, flight: tuple[dist.Work, Tensor]) -> Tensor:
    flight[0].wait()
    return arrived
