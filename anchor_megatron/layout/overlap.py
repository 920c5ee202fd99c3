"""Heads travel in parts, so that pieces which wait can begin before all their keys have come.

Attention of one head asks nothing of another. In two parts, with 8 key/value heads:

    transfer    | heads 0-3 | heads 4-7 |
    attention   | local pieces  | waiting, heads 0-3 | waiting, heads 4-7 |

and in one part the waiting pieces would begin where the transfer ends. The backward pass is the mirror image:
gradients of one part go home under the next part's kernel call. Each head is computed as it would be
otherwise, so the result is the same bit for bit.

With L seconds of local pieces, W of waiting ones, P parts that take w each to arrive, and c = W/P to compute,
a pass takes as long as its longest chain:

    max(L + W,  w + W,  P w + c)
"""

from __future__ import annotations

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.placement import Placement, placement_traffic
from anchor_megatron.layout.relay import Hops, wire_seconds

__all__ = ["choose_head_parts", "layer_seconds", "local_and_waiting", "waits"]

_WORTH = 0.98  # of the time in one part: every part is a kernel call and a transfer more


def choose_head_parts(placement: Placement, costs: CostModel, found: Hops | None) -> int:
    """Parts of the heads in which rows travel, by the steps `found`: the quickest by the cost model, of
    numbers that divide the key/value heads. A function of placement and costs alone, as all ranks must take
    the same.
    """
    moved = placement_traffic(placement, ranks_per_node=costs.ranks_per_node)
    if not moved.received.any():
        return 1
    local, waiting = local_and_waiting(placement, costs)
    seconds = {}
    for parts in (n for n in range(1, costs.shape.groups + 1) if costs.shape.groups % n == 0):
        wire = wire_seconds(moved, found, costs, head_parts=parts)
        seconds[parts] = layer_seconds(local, waiting, wire, costs, head_parts=parts).max(axis=1).sum()
    quickest = min(seconds, key=lambda parts: seconds[parts])
    return quickest if seconds[quickest] < _WORTH * seconds[1] else 1


def local_and_waiting(placement: Placement, costs: CostModel) -> tuple[np.ndarray, np.ndarray]:
    """Attention seconds [2, ranks], forward and backward, of local pieces and of waiting ones."""
    rows = placement.stop - placement.start
    keys = placement.stop - placement.cu_seqlens[placement.document]
    both = (costs.forward_seconds(rows, keys), costs.backward_seconds(rows, keys))
    which, ranks = waits(placement), placement.context_parallel_size
    local, waiting = (
        np.stack([np.bincount(placement.rank[at], weights=one[at], minlength=ranks) for one in both])
        for at in (~which, which)
    )
    return local, waiting


def waits(placement: Placement) -> np.ndarray:
    """Whether a piece needs keys that it is not."""
    return placement.start > placement.cu_seqlens[placement.document]


def layer_seconds(
    local: np.ndarray, waiting: np.ndarray, wire: np.ndarray, costs: CostModel, *, head_parts: int
) -> np.ndarray:
    """Seconds [2, ranks] of attention with transfers that alone take `wire` [ranks] in all their parts. A
    kernel call more takes as long to begin and end as a transfer.
    """
    attention = local + waiting + (head_parts - 1) * costs.machine.latency_us / 1e6
    longest = np.maximum(wire / head_parts + waiting, wire + waiting / head_parts)
    exposed = np.maximum(longest - local - waiting, 0)
    return attention + exposed + costs.machine.contention * (wire - exposed)
