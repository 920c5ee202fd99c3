"""The sparse exchange: one all-to-all, or two, that carry only the key/value rows somebody waits for.

    rank 0 holds rows 0..3 of a document, rank 1 rows 4..7:      rank 0 sends rows 0..3, rank 1 receives them
    forward   start -> ... local pieces ... -> finish            received k, v
    backward  start_adjoint -> ... local pieces ... -> finish    gradients of the rows that were sent

The adjoint of "copy row i to ranks a and b" is "add what comes back from a and b to row i's gradient".

In two levels (a plan with a `relay`, `layout/relay.py`) rows cross to each node once and are handed on there:

    forward   pack own rows  | between nodes | pack own and received rows | inside nodes
    backward  sum gradients of rows from inside | inside nodes | add those to the rows that crossed | between

The gradient of a row that crossed is thus summed in its node, rounded once, and crosses once. On a GPU the
step in the middle waits on a stream of its own, so that both transfers fly under the local pieces.

Legend: T rows of this rank, S rows sent, R received rows, of the first all-to-all and then of the second, K
gathered keys, G key/value heads, H head dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.plan_tensors import PlanTensors
from anchor_megatron.attention.rows import pack_rows, sum_received

__all__ = ["InFlight", "start_exchange", "start_exchange_adjoint"]


@dataclass
class InFlight:
    """An exchange under way; `finish()` gives what arrived, [rows, 2, G, H]: keys and values (or their
    gradients).
    """

    arriving: Tensor
    work: dist.Work | None  # its last all-to-all, behind which the others lie
    held: tuple[Tensor, ...]  # until the transfer ends

    def finish(self) -> Tensor:
        """Waits (on a GPU: makes the current stream wait) and returns the received rows."""
        if self.work is not None:
            self.work.wait()
        return self.arriving


def start_exchange(
    k_TGH: Tensor, v_TGH: Tensor, plan: PlanTensors, group: dist.ProcessGroup | None
) -> InFlight:
    """Starts sending this rank's rows `plan.send_index`; what arrives has `plan.received_tokens` rows.

    Its adjoint is `start_exchange_adjoint` with the gradients of the received rows.
    """
    leaving, arriving = (
        k_TGH.new_empty((rows, 2, *k_TGH.shape[1:])) for rows in (plan.sent_tokens, plan.received_tokens)
    )
    sent, crossed = plan.send_index.numel(), sum(plan.recv_counts)
    here, there = leaving[:sent], arriving[:crossed]
    pack_rows(k_TGH, v_TGH, arriving[:0], plan.send_index, out_S2GH=here)
    work = _all_to_all(there, here, plan.recv_counts, plan.send_counts, group)
    if (relay := plan.relay) is not None:
        with _behind(work, leaving):
            pack_rows(k_TGH, v_TGH, there, relay.send_index, out_S2GH=leaving[sent:])
            counts = (relay.recv_counts, relay.send_counts)
            work = _all_to_all(arriving[crossed:], leaving[sent:], *counts, group)
    return InFlight(arriving, work, (leaving, k_TGH, v_TGH))


def start_exchange_adjoint(
    dkeys_KGH: Tensor, dvalues_KGH: Tensor, plan: PlanTensors, group: dist.ProcessGroup | None
) -> InFlight:
    """Starts sending gradients of received rows home, each the sum over the places in `dkeys` and `dvalues`
    that the row was gathered to. What arrives belongs to the rows `plan.send_index`, then to the relay's.
    """
    leaving, arriving = (
        dkeys_KGH.new_empty((rows, 2, *dkeys_KGH.shape[1:]))
        for rows in (plan.received_tokens, plan.sent_tokens)
    )
    sent, crossed = plan.send_index.numel(), sum(plan.recv_counts)
    offsets = plan.gradient_offsets[plan.gradient_offsets.numel() - 1 - plan.received_tokens :]
    add = functools.partial(sum_received, dkeys_KGH, dvalues_KGH, arriving, plan=plan)
    here, there = leaving[:crossed], arriving[:sent]
    if (relay := plan.relay) is None:
        add(offsets, out_R2GH=here)
        work = _all_to_all(there, here, plan.send_counts, plan.recv_counts, group)
        return InFlight(arriving, work, (leaving,))
    add(offsets[crossed:], out_R2GH=leaving[crossed:])
    counts = (relay.send_counts, relay.recv_counts)
    work = _all_to_all(arriving[sent:], leaving[crossed:], *counts, group)
    with _behind(work, leaving):
        add(offsets[: crossed + 1], out_R2GH=here)
        work = _all_to_all(there, here, plan.send_counts, plan.recv_counts, group)
    return InFlight(arriving, work, (leaving, dkeys_KGH, dvalues_KGH))


def _all_to_all(
    arriving: Tensor,
    leaving: Tensor,
    recv_counts: tuple[int, ...],
    send_counts: tuple[int, ...],
    group: dist.ProcessGroup | None,
) -> dist.Work | None:
    """Of parts by rank; empty ones are not sent. Its adjoint is itself, the other way round."""
    if len(send_counts) == 1:  # one rank: nobody to send to
        return None
    assert group is not None, "a plan for several context-parallel ranks needs their process group"
    return dist.all_to_all_single(
        arriving, leaving, list(recv_counts), list(send_counts), group=group, async_op=True
    )


@contextlib.contextmanager
def _behind(work: dist.Work | None, tensor: Tensor) -> Iterator[None]:
    """Work that begins when `work` has ended: on a GPU on another stream, without holding up this one."""
    if not tensor.is_cuda:
        if work is not None:
            work.wait()
        yield
        return
    stream = _side_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        if work is not None:
            work.wait()
        yield


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # before kernels of the current stream, as transfers go
