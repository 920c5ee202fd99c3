"""Heads that travel in parts: predicted as a timetable of their transfers and kernel calls has it, and chosen
where that is quicker.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchor_megatron.layout.cost import CostModel, LayerShape, Machine
from anchor_megatron.layout.exchanges import Way, find_way
from anchor_megatron.layout.overlap import choose_head_parts, local_and_waiting, pass_seconds
from anchor_megatron.layout.placement import Placement, place, placement_traffic
from anchor_megatron.profiling.predict import predict
from anchor_megatron.profiling.windows import draw_window

TABLE = Path(__file__).parents[1] / "benchmarks" / "document_lengths.csv"
IDEAL = CostModel(Machine(latency_us=0, contention=0))
seconds = st.floats(0, 10)


def placed(ranks: int, costs: CostModel) -> Placement:
    tokens = 16384 * ranks
    cu_seqlens = draw_window(TABLE, tokens=tokens, longest=tokens // 4, seed=1)
    return place("document", cu_seqlens, context_parallel_size=ranks, window_length=tokens, costs=costs)


def forward_ends(local: float, waiting: float, wire: float, parts: int) -> float:
    """Transfers one after another; attention to local pieces, then to each part's that has arrived."""
    now = local
    for part in range(1, parts + 1):
        now = max(now, part * wire / parts) + waiting / parts
    return now


def backward_ends(local: float, waiting: float, wire: float, parts: int) -> float:
    """Attention to each part's waiting pieces, whose gradients then set out, then to local ones."""
    arrived = 0.0
    for part in range(1, parts + 1):
        arrived = max(arrived, part * waiting / parts) + wire / parts
    return max(arrived, waiting + local)


@given(seconds, seconds, seconds, st.integers(1, 8))
def test_a_layer_takes_as_long_as_its_timetable(
    local: float, waiting: float, wire: float, parts: int
) -> None:
    both = [np.full((2, 1), x) for x in (local, waiting)]
    found = pass_seconds(*both, np.array([wire]), IDEAL, parts=parts, call=np.zeros(1))
    expected = [ends(local, waiting, wire, parts) for ends in (forward_ends, backward_ends)]
    assert found[:, 0] == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "per_node"), [(1, None), (2, None), (8, None), (64, None), (32, 8)])
def test_the_quickest_number_of_parts_is_taken(ranks: int, per_node: int | None) -> None:
    costs = CostModel(ranks_per_node=per_node)
    placement = placed(ranks, costs)
    way = find_way(placement, exchange="sparse", ring_rows=1, costs=costs)
    forward, backward = way.head_parts
    assert backward % forward == 0 and 8 % backward == 0
    assert (backward > 1) == (ranks > 8), "heads travel in parts where most of a window waits"
    one_head = replace(costs, shape=LayerShape(heads=4, groups=1))
    assert find_way(placement, exchange="sparse", ring_rows=1, costs=one_head).head_parts == (1, 1)
    assert find_way(placement, exchange="direct", ring_rows=1, costs=costs) == Way()
    taken = predict("sparse", placement, costs, ring_rows=1)
    assert taken is not None and taken.head_parts == way.head_parts
    local, waiting = local_and_waiting(placement, costs)
    assert taken.attention == pytest.approx(local + waiting)
    if backward > 1:
        slow = replace(costs, machine=Machine(latency_us=10_000))
        moved = placement_traffic(placement, ranks_per_node=per_node)
        assert choose_head_parts(placement, slow, moved, way.hops) == (1, 1)
