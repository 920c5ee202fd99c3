"""Attention over a plan with rounds: keys arrive a few rows at a time, and partial results are merged.

    forward    start 1 | local pieces, own round | finish 1, start 2 | round 1 | finish 2 | round 2 ...
    backward   the same transfers again, and each round's key gradients go home under the next round

For documents whose keys do not fit at once: beside its own rows a rank holds the rows of two rounds, the
gathered copy of one, and an accumulator. Nothing that was received is kept for the backward pass.

The merge. A round gives query i the output o = sum_j p_j v_j and L = log sum_j exp(s_j) over its own keys j,
with p_j = exp(s_j - L). Softmax over the keys of two rounds a and b weighs their outputs by their shares of
the common denominator:

    L = log(exp(L_a) + exp(L_b))        o = exp(L_a - L) o_a + exp(L_b - L) o_b

in fp32 at least (the online softmax of arXiv 1805.02867, as in Ring Attention, arXiv 2310.01889). Each
round's output is rounded once more than a kernel call over all keys would round it, so unlike the sparse
exchange's the result depends on the rounds, by about one rounding.

Backward. The gradient of a score is ds_ij = p_ij (dp_ij - D_i), where p_ij = exp(s_ij - L_i) takes the merged
L and D_i = sum of dout_i * out_i the merged output. Given those, a kernel's backward pass over one round's
keys is exactly that round's share of dq, and the whole of its keys' dk and dv from these queries.

Legend: T rows of this rank, W waiting ones, Q of a round, N query heads, G key/value heads, H head dim, R
received rows of a round, K gathered keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.exchange import InFlight, start_exchange, start_exchange_adjoint
from anchor_megatron.attention.kernels import Kernel
from anchor_megatron.attention.plan_tensors import PlanTensors, RoundTensors
from anchor_megatron.attention.rows import add_home, gather_keys, mix_rows

__all__ = ["ring_attention"]


def ring_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    *,
    plan: PlanTensors,
    kernel: Kernel,
    scale: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Attention of this rank's rows, [T, N, H] in q's dtype, by the rounds of `plan`.

    All ranks of `group` must call it together, each with its own plan of the same placement and round size.
    """
    return _RingAttention.apply(q_TNH, k_TGH, v_TGH, plan, kernel, scale, group)


class _RingAttention(torch.autograd.Function):
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
        out, lse_local = q.new_empty(q.shape), None
        merged = _Merged(q[n:])
        flights = _Flights(k, v, plan.rounds, group)
        if n:
            lse_local = kernel.forward(q[:n], k[:n], v[:n], plan.local_segments, scale=scale, out_TNH=out[:n])
        for number, one in enumerate(plan.rounds):
            received = flights.take(number)
            if one.queries:
                keys, values = gather_keys(k, v, received, one.plan)
                rows = one.pick(q[n:])
                part = torch.empty_like(rows)
                lse = kernel.forward(
                    rows,
                    keys,
                    values,
                    one.plan.waiting_segments,
                    scale=scale,
                    out_TNH=part,
                    causal=number == 0,
                )
                merged.add(part, lse, one)
        out[n:] = merged.out_WNH
        ctx.save_for_backward(q, k, v, out, lse_local, merged.lse_NW)
        ctx.plan, ctx.kernel, ctx.scale, ctx.group = plan, kernel, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_local, lse_NW = ctx.saved_tensors
        plan, kernel, scale, group = ctx.plan, ctx.kernel, ctx.scale, ctx.group
        n, dout = plan.local_tokens, grads[0].contiguous()
        dq, (dk, dv) = q.new_empty(q.shape), (_wide_zeros(x) for x in (k, v))
        dq_waiting = _wide_zeros(q[n:])
        flights = _Flights(k, v, plan.rounds, group)
        if n:
            into = (dq[:n], *(x.new_empty(x.shape) for x in (k[:n], v[:n])))
            tensors = (dout[:n], q[:n], k[:n], v[:n], out[:n], lse_local)
            kernel.backward(*tensors, plan.local_segments, scale=scale, into=into)
            dk[:n], dv[:n] = into[1:]
        homeward: tuple[InFlight, RoundTensors, Tensor, Tensor] | None = None
        for number, one in enumerate(plan.rounds):
            received = flights.take(number)
            keys, values = gather_keys(k, v, received, one.plan)
            dkeys, dvalues = torch.empty_like(keys), torch.empty_like(values)
            if one.queries:
                rows = [one.pick(x[n:]) for x in (dout, q, out)]
                lse = one.pick(lse_NW.T).T.contiguous()
                part = torch.empty_like(rows[1])
                kernel.backward(
                    rows[0], rows[1], keys, values, rows[2], lse, one.plan.waiting_segments,
                    scale=scale, into=(part, dkeys, dvalues), causal=number == 0,
                )  # fmt: skip
                one.add_to(dq_waiting, part)
            if number == 0:  # of own keys alone
                add_home(dk, dv, dkeys, dvalues, received, one.plan)
                continue
            going = start_exchange_adjoint(dkeys, dvalues, one.plan, group)
            _settle(dk, dv, homeward)
            homeward = (going, one, dkeys, dvalues)
        _settle(dk, dv, homeward)
        dq[n:] = dq_waiting
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Merged:
    """Output and log-sum-exp of the waiting rows over the rounds so far."""

    def __init__(self, q_WNH: Tensor) -> None:
        self.out_WNH = _wide_zeros(q_WNH)
        self.lse_NW = self.out_WNH.new_full((q_WNH.shape[1], q_WNH.shape[0]), float("-inf"))

    def add(self, out_QNH: Tensor, lse_NQ: Tensor, one: RoundTensors) -> None:
        """Takes in a round's result for its rows."""
        before = one.pick(self.lse_NW.T).T
        lse_NQ = lse_NQ.to(before.dtype)
        after = torch.logaddexp(before, lse_NQ)
        keep, new = ((x - after).exp() for x in (before, lse_NQ))
        mix_rows(self.out_WNH, out_QNH, one.query_index, keep_NQ=keep, new_NQ=new)
        one.put(self.lse_NW.T, after.T)


class _Flights:
    """The rounds' transfers, each started when the one before has arrived."""

    def __init__(
        self, k: Tensor, v: Tensor, rounds: tuple[RoundTensors, ...], group: dist.ProcessGroup | None
    ) -> None:
        self._tensors, self._rounds, self._group = (k, v), rounds, group
        self._empty = k.new_empty((0, 2, *k.shape[1:]))
        self._next: InFlight | None = None
        self._start(1)

    def take(self, number: int) -> Tensor:
        """The rows [R, 2, G, H] that arrive in a round, and starts the next one's."""
        if number == 0:
            return self._empty
        assert self._next is not None, f"round {number} was not started"
        received = self._next.finish()
        self._start(number + 1)
        return received

    def _start(self, number: int) -> None:
        if number < len(self._rounds):
            self._next = start_exchange(*self._tensors, self._rounds[number].plan, self._group)


def _settle(dk: Tensor, dv: Tensor, homeward: tuple[InFlight, RoundTensors, Tensor, Tensor] | None) -> None:
    """Adds the key gradients of a round, which have come home, to their rows'."""
    if homeward is not None:
        going, one, dkeys, dvalues = homeward
        add_home(dk, dv, dkeys, dvalues, going.finish(), one.plan)


def _wide_zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
