"""The sparse exchange: one all-to-all that carries only the key/value rows somebody waits for.

    rank 0 holds rows 0..3 of a document, rank 1 rows 4..7:      rank 0 sends rows 0..3, rank 1 receives them
    forward   start -> ... local pieces ... -> finish            received k, v
    backward  start_adjoint -> ... local pieces ... -> finish    gradients of the rows that were sent

The adjoint of "copy row i to ranks a and b" is "add what comes back from a and b to row i's gradient".

Legend: S rows sent, R rows received, G key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.plan_tensors import PlanTensors
from anchor_megatron.attention.rows import pack_rows

__all__ = ["InFlight", "start_exchange", "start_exchange_adjoint"]


@dataclass
class InFlight:
    """An all-to-all under way; `finish()` gives what arrived, [rows, 2, G, H]: keys and values (or their
    gradients).
    """

    arriving: Tensor
    leaving: Tensor  # held until the transfer ends
    work: dist.Work | None

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
    return _all_to_all(pack_rows(k_TGH, v_TGH, plan), plan.send_counts, plan.recv_counts, group)


def start_exchange_adjoint(
    drecv_R2GH: Tensor, plan: PlanTensors, group: dist.ProcessGroup | None
) -> InFlight:
    """Starts sending gradients of received rows home; what arrives belongs to the rows `plan.send_index`."""
    return _all_to_all(drecv_R2GH, plan.recv_counts, plan.send_counts, group)


def _all_to_all(
    leaving: Tensor,
    send_counts: tuple[int, ...],
    recv_counts: tuple[int, ...],
    group: dist.ProcessGroup | None,
) -> InFlight:
    arriving = leaving.new_empty((sum(recv_counts), *leaving.shape[1:]))
    if len(send_counts) == 1:  # one rank: nobody to send to
        return InFlight(arriving, leaving, None)
    assert group is not None, "a plan for several context-parallel ranks needs their process group"
    work = dist.all_to_all_single(
        arriving, leaving, list(recv_counts), list(send_counts), group=group, async_op=True
    )
    return InFlight(arriving, leaving, work)
