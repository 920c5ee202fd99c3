"""The ways in which keys and values of split documents travel, and what each needs planned.

sparse    all that a rank waits for at once                 the plan itself
ring      in rounds of bounded size                         and its rounds
ulysses   not at all: heads are exchanged for tokens        and the way to whole documents
"""

from __future__ import annotations

import dataclasses

from anchor_megatron.layout.heads import make_whole
from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.plan import Plan, make_plan
from anchor_megatron.layout.rounds import make_rounds

__all__ = ["EXCHANGES", "plan_exchange"]

EXCHANGES = ("sparse", "ring", "ulysses")


def plan_exchange(placement: Placement, rank: int, *, exchange: str, ring_rows: int) -> Plan:
    """The plan of `rank` for an exchange; `ring_rows` bounds the rows received in a round of ring.

    A function of the placement and these options alone, so that all ranks' plans fit together.
    """
    assert exchange in EXCHANGES, f"got exchange {exchange!r}, expected one of {', '.join(EXCHANGES)}"
    plan = make_plan(placement, rank)
    if placement.context_parallel_size == 1 or exchange == "sparse":
        return plan
    if exchange == "ring":
        return dataclasses.replace(plan, rounds=tuple(make_rounds(placement, rank, rows=ring_rows)))
    return dataclasses.replace(plan, whole=make_whole(placement))
