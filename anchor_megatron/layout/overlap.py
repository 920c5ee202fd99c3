"""How rows travel so that little of it is waited for: in which steps, and in how many parts of the heads.

Attention of one head asks nothing of another, so pieces that wait can begin before all their keys have come.
In two parts, with 8 key/value heads:

    transfer    | heads 0-3 | heads 4-7 |
    attention   | local pieces  | waiting, heads 0-3 | waiting, heads 4-7 |

and in one the waiting pieces would begin where the transfer ends. The backward pass is the mirror image:
gradients of one part go home under the next part's kernel call. Each head is computed as it would be
otherwise, so the result is the same bit for bit.

With L seconds of local pieces, W of waiting ones, P parts that take w each to arrive, and c = W/P to compute,
a pass takes as long as its longest chain:

    max(L + W,  w + W,  P w + c)

Parts are not free. The forward kernel gives each tile of query rows to one multiprocessor for all its keys,
so that at the end of a call most wait for the last tile, on average half of the longest one: 0.4 ms where it
sees 65,536 keys. The backward kernel goes by keys and its tiles are short. So keys travel in few parts or in
one, gradients in many.

What is chosen is a function of placement and costs alone, so that all ranks choose the same. The steps are
those of `relay.py`.
"""

from __future__ import annotations

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.relay import Hops, group_sizes, hops, wire_seconds
from anchor_megatron.layout.traffic import Traffic

__all__ = ["call_seconds", "choose_head_parts", "choose_hops", "local_and_waiting", "pass_seconds", "waits"]

_WORTH = 0.98  # of the time as it would be: a further step or part must bring more than the model may err


def choose_hops(placement: Placement, costs: CostModel, moved: Traffic) -> Hops | None:
    """The two steps in which what is `moved` is quickest by the cost model; None: one."""
    ranks = placement.context_parallel_size
    near = min(costs.ranks_per_node or ranks, ranks)
    if near < ranks and not moved.crossing.any():
        return None
    work = local_and_waiting(placement, costs)

    def seconds(found: Hops | None) -> float:
        wire = wire_seconds(moved, found, costs)
        return float(pass_seconds(*work, wire, costs, parts=1, call=np.zeros(ranks)).max(axis=1).sum())

    quickest, least = None, _WORTH * seconds(None)
    for size in group_sizes(ranks, near):
        found = hops(placement, size)
        if (taken := seconds(found)) < least:
            quickest, least = found, taken
    return quickest


def choose_head_parts(
    placement: Placement, costs: CostModel, moved: Traffic, found: Hops | None
) -> tuple[int, int]:
    """Parts of the heads in which keys and values travel, and in which their gradients do, by the steps
    `found`: the quickest by the cost model that divide the key/value heads; the first divides the second.
    """
    local, waiting = local_and_waiting(placement, costs)
    calls = call_seconds(placement, costs)

    def quickest(direction: int, candidates: list[int]) -> int:
        seconds = {}
        for parts in candidates:
            wire = wire_seconds(moved, found, costs, head_parts=parts)
            work, call = (local[direction], waiting[direction]), calls[direction]
            seconds[parts] = pass_seconds(*work, wire, costs, parts=parts, call=call).max()
        best = min(candidates, key=lambda parts: seconds[parts])
        return best if seconds[best] < _WORTH * seconds[candidates[0]] else candidates[0]

    divisors = [n for n in range(1, costs.shape.groups + 1) if costs.shape.groups % n == 0]
    forward = quickest(0, divisors)
    return forward, quickest(1, [n for n in divisors if n % forward == 0])


def local_and_waiting(placement: Placement, costs: CostModel) -> tuple[np.ndarray, np.ndarray]:
    """Attention seconds [2, ranks], forward and backward, of local pieces and of waiting ones."""
    rows, keys = _rows_and_keys(placement)
    both = (costs.forward_seconds(rows, keys), costs.backward_seconds(rows, keys))
    which, ranks = waits(placement), placement.context_parallel_size
    local, waiting = (
        np.stack([np.bincount(placement.rank[at], weights=one[at], minlength=ranks) for one in both])
        for at in (~which, which)
    )
    return local, waiting


def call_seconds(placement: Placement, costs: CostModel) -> np.ndarray:
    """What one kernel call more costs, seconds [2, ranks], forward and backward: as much as a transfer to
    begin and end, and forward half of the longest tile of a rank's waiting pieces.
    """
    machine, which = costs.machine, waits(placement)
    longest = np.zeros(placement.context_parallel_size)
    np.maximum.at(longest, placement.rank[which], _rows_and_keys(placement)[1][which])
    tile = 4 * machine.tile * costs.shape.head_dim * machine.tiles_at_once / machine.forward_tflops / 1e12
    return machine.latency_us / 1e6 + np.stack([longest * tile / 2, np.zeros_like(longest)])


def waits(placement: Placement) -> np.ndarray:
    """Whether a piece needs keys that it is not."""
    return placement.start > placement.cu_seqlens[placement.document]


def pass_seconds(
    local: np.ndarray,
    waiting: np.ndarray,
    wire: np.ndarray,
    costs: CostModel,
    *,
    parts: int,
    call: np.ndarray,
) -> np.ndarray:
    """Seconds [..., ranks] of one pass, or more, with transfers that alone take `wire` [ranks] in all their
    parts and kernel calls that cost `call` more than their share of the work.
    """
    longest = np.maximum(wire / parts + waiting, wire + waiting / parts)
    exposed = np.maximum(longest - local - waiting, 0)
    return local + waiting + (parts - 1) * call + exposed + costs.machine.contention * (wire - exposed)


def _rows_and_keys(placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    return placement.stop - placement.start, placement.stop - placement.cu_seqlens[placement.document]
