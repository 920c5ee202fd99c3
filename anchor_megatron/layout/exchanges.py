"""The ways in which keys and values of split documents travel, and what each needs planned.

direct    all that a rank waits for, from who has it        the plan itself
sparse    the same, where quicker in steps and by parts     and the second step
ring      the same, where that is too much in rounds        and its rounds
ulysses   not at all: heads are exchanged for tokens        and the way to whole documents
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.heads import make_whole
from anchor_megatron.layout.overlap import choose_head_parts, choose_hops
from anchor_megatron.layout.placement import Placement, placement_traffic
from anchor_megatron.layout.plan import Plan, make_plan
from anchor_megatron.layout.relay import Hops, make_relay
from anchor_megatron.layout.rounds import make_rounds

__all__ = ["EXCHANGES", "Way", "find_way", "plan_exchange"]

EXCHANGES = ("sparse", "direct", "ring", "ulysses")


@dataclass(frozen=True)
class Way:
    """How needed rows travel.

    rounds      of exchange ring; 0: all rows at once
    hops        the two steps of two levels; None: there is one
    head_parts  parts of the heads that travel one after another, forward and backward
    """

    rounds: int = 0
    hops: Hops | None = None
    head_parts: tuple[int, int] = (1, 1)


def plan_exchange(
    placement: Placement,
    rank: int,
    *,
    exchange: str,
    ring_rows: int,
    costs: CostModel = CostModel(),  # noqa: B008
) -> Plan:
    """The plan of `rank` for an exchange; `ring_rows` bounds the rows that ring receives at once, `costs`
    says which way is quickest.

    A function of the placement and these options alone, so that all ranks' plans fit together. ValueError
    for `ring_rows` below 1.
    """
    assert exchange in EXCHANGES, f"got exchange {exchange!r}, expected one of {', '.join(EXCHANGES)}"
    if exchange == "ulysses" and placement.context_parallel_size > 1:
        return dataclasses.replace(make_plan(placement, rank), whole=make_whole(placement, rank))
    way = find_way(placement, exchange=exchange, ring_rows=ring_rows, costs=costs)
    if way.rounds:
        rounds = make_rounds(placement, rank, rounds=way.rounds)
        return dataclasses.replace(make_plan(placement, rank), rounds=tuple(rounds))
    plan = make_plan(placement, rank) if way.hops is None else make_relay(placement, rank, way.hops)
    return dataclasses.replace(plan, head_parts=way.head_parts)


def find_way(placement: Placement, *, exchange: str, ring_rows: int, costs: CostModel) -> Way:
    """How needed rows travel best by the cost model, if the exchange leaves a choice.

    With ring no rank receives more than `ring_rows` rows at a time: rounds are for windows in which one
    would, and two steps are not taken where they would make it so.
    """
    if exchange == "ring" and ring_rows < 1:
        raise ValueError(f"rows of a round: got {ring_rows}, expected at least 1")
    moved = placement_traffic(placement, ranks_per_node=costs.ranks_per_node)
    most = int(moved.received.max())
    if most == 0 or exchange in ("direct", "ulysses"):
        return Way()
    if exchange == "ring" and most > ring_rows:
        return Way(rounds=-(-most // ring_rows))
    found = choose_hops(placement, costs, moved)
    if found is not None and exchange == "ring":
        most = int(found.received(placement.context_parallel_size).max())
        found = found if most <= ring_rows else None
    return Way(hops=found, head_parts=choose_head_parts(placement, costs, moved, found))
