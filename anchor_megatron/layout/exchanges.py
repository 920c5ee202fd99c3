"""The ways in which keys and values of split documents travel, and what each needs planned.

sparse    all that a rank waits for at once                 the plan itself, or in two levels
ring      in rounds of bounded size                         and its rounds
ulysses   not at all: heads are exchanged for tokens        and the way to whole documents
"""

from __future__ import annotations

import dataclasses

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.heads import make_whole
from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.plan import Plan, make_plan
from anchor_megatron.layout.relay import make_relay, quicker_hops
from anchor_megatron.layout.rounds import make_rounds

__all__ = ["EXCHANGES", "plan_exchange"]

EXCHANGES = ("sparse", "ring", "ulysses")


def plan_exchange(
    placement: Placement,
    rank: int,
    *,
    exchange: str,
    ring_rows: int,
    costs: CostModel = CostModel(),  # noqa: B008
) -> Plan:
    """The plan of `rank` for an exchange; `ring_rows` bounds the rows received in a round of ring, `costs`
    has the nodes and says whether sparse goes through them in two levels.

    A function of the placement and these options alone, so that all ranks' plans fit together.
    """
    assert exchange in EXCHANGES, f"got exchange {exchange!r}, expected one of {', '.join(EXCHANGES)}"
    if placement.context_parallel_size == 1 or exchange == "sparse":
        found = quicker_hops(placement, costs)
        return make_plan(placement, rank) if found is None else make_relay(placement, rank, found)
    plan = make_plan(placement, rank)
    if exchange == "ring":
        return dataclasses.replace(plan, rounds=tuple(make_rounds(placement, rank, rows=ring_rows)))
    return dataclasses.replace(plan, whole=make_whole(placement, rank))
