"""The exchange in two levels: rows cross to a node, or to a group of ranks of one node, once, reach whoever
needs them, and their gradients come home; what is attended to is what one level brings.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from test_attention import SCALE, dense, inputs
from test_topology import borders_of, topologies

from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels_cpu import TorchCpuKernel
from anchor_megatron.attention.plan_tensors import plan_arrays, plan_tensors
from anchor_megatron.layout.cost import CostModel, Machine
from anchor_megatron.layout.exchanges import plan_exchange
from anchor_megatron.layout.overlap import local_and_waiting, pass_seconds
from anchor_megatron.layout.placement import PLACEMENTS, Placement, place, placement_traffic
from anchor_megatron.layout.plan import Plan, Relay, make_plans
from anchor_megatron.layout.relay import group_sizes, hops, make_relay, wire_seconds
from anchor_megatron.testing.ranks import run_ranks

SLOW = Machine(between_gb_per_s=0.01, latency_us=0)  # every row that need not cross is worth an all-to-all


def placed(cu_seqlens: np.ndarray, ranks: int, per_node: int, kind: str) -> Placement:
    costs = CostModel(SLOW, ranks_per_node=per_node)
    window = int(cu_seqlens[-1])
    return place(kind, cu_seqlens, context_parallel_size=ranks, window_length=window, costs=costs)


def carried(steps: list[Plan] | list[Relay], held: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Tokens [to][from] of an all-to-all in which every rank sends of the tokens that it holds."""
    ranks = len(steps)
    moved = []
    for rank in range(ranks):
        parts = []
        for source, step in enumerate(steps):
            begin = sum(step.send_counts[:rank])
            parts.append(held[source][step.send_index[begin : begin + step.send_counts[rank]]])
            assert parts[-1].size == steps[rank].recv_counts[source], "sent is not received"
        moved.append(parts)
    return moved


@given(topologies(), st.sampled_from(PLACEMENTS))
def test_rows_cross_to_a_node_once_and_reach_who_needs_them(
    topology: tuple[np.ndarray, int, int], kind: str
) -> None:
    cu_seqlens, ranks, per_node = topology
    placement = placed(cu_seqlens, ranks, per_node, kind)
    found = hops(placement, per_node)
    plans, direct = [make_relay(placement, rank, found) for rank in range(ranks)], make_plans(placement)
    relays = [plan.relay for plan in plans if plan.relay is not None]
    own = [plan.token_index for plan in plans]
    crossed = carried(plans, own)
    at_hand = [np.concatenate([own[rank], *crossed[rank]]) for rank in range(ranks)]
    onward = carried(relays, at_hand)
    node = np.arange(ranks) // per_node
    share = []
    for rank in range(ranks):
        whole = np.concatenate([at_hand[rank], *onward[rank]])
        assert np.unique(whole).size == whole.size, "a row reaches a rank twice"
        assert whole.size == own[rank].size + plans[rank].received_tokens
        seen = direct[rank]
        one_level = np.concatenate([own[rank], *carried(direct, own)[rank]])
        assert np.array_equal(whole[plans[rank].key_index], one_level[seen.key_index])
        for source in range(ranks):
            assert not crossed[rank][source].size or node[source] != node[rank], "crosses inside a node"
            assert not onward[rank][source].size or node[source] == node[rank], "handed on to another node"
        needed = np.isin(np.concatenate(crossed[rank]), whole[plans[rank].key_index])
        passed = np.isin(np.concatenate(crossed[rank]), at_hand[rank][relays[rank].send_index])
        assert (needed | passed).all(), "a row that crossed is neither needed nor handed on"
        assert np.isin(np.concatenate(onward[rank]), whole[plans[rank].key_index]).all(), "not needed"
        share.append(sum(part.size for part in crossed[rank]))
    moved = placement_traffic(placement, ranks_per_node=per_node)
    by_node = np.array(share).reshape(-1, per_node)
    assert by_node.sum(axis=1).tolist() == moved.node_crossing.tolist(), "crosses to a node more than once"
    assert by_node.sum() <= moved.crossing.sum(), "more crosses than in one level"
    assert (by_node.max(axis=1) - by_node.min(axis=1) <= 1).all(), "links of a node are not level"


@given(topologies(), st.sampled_from(PLACEMENTS), st.sampled_from([0.01, 1.0, 45.0, 10000.0]))
def test_the_quicker_way_is_taken(topology: tuple[np.ndarray, int, int], kind: str, between: float) -> None:
    cu_seqlens, ranks, per_node = topology
    placement = placed(cu_seqlens, ranks, per_node, kind)
    costs = CostModel(Machine(between_gb_per_s=between, latency_us=0.1), ranks_per_node=per_node)
    plans = [
        plan_exchange(placement, rank, exchange="sparse", ring_rows=1, costs=costs) for rank in range(ranks)
    ]
    moved = placement_traffic(placement, ranks_per_node=per_node)
    sizes = group_sizes(ranks, per_node)
    assert sizes == [per_node] if per_node < ranks else all(ranks % size == 0 for size in sizes)
    work, nothing = local_and_waiting(placement, costs), np.zeros(ranks)
    wires = [wire_seconds(moved, way, costs) for way in (None, *(hops(placement, n) for n in sizes))]
    one, *two = (pass_seconds(*work, x, costs, parts=1, call=nothing).max(axis=1).sum() for x in wires)
    expected = moved.received.any() and min(two, default=one) < 0.98 * one
    assert [plan.relay is not None for plan in plans] == [expected] * ranks


def nodes_on_rank(
    rank: int, world_size: int, cases: list[tuple[np.ndarray, str, int]], dtype: torch.dtype
) -> list[tuple[np.ndarray, list[torch.Tensor], bool, bool]]:
    """For each case: tokens held; rows of output, dq, dk, dv; whether it went in two levels; and whether a
    second run is the same bit for bit.
    """
    found = []
    for borders, kind, per_node in cases:
        placement = placed(borders, world_size, per_node, kind)
        costs = CostModel(SLOW, ranks_per_node=per_node)
        plan = plan_exchange(placement, rank, exchange="sparse", ring_rows=1, costs=costs)
        arrays = {name: torch.from_numpy(x).int() for name, x in plan_arrays(plan).items()}
        tensors, mine = plan_tensors(plan, arrays), torch.from_numpy(plan.token_index)
        *leaves, dout = (x[mine].to(dtype).requires_grad_() for x in inputs(int(borders[-1]), seed=1))
        runs = []
        for _ in range(2):
            out = planned_attention(
                *leaves, plan=tensors, kernel=TorchCpuKernel(), scale=SCALE, group=dist.group.WORLD
            )
            runs.append([out.detach(), *torch.autograd.grad(out, leaves, dout.detach())])
        same = all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
        found.append((plan.token_index, runs[0], plan.relay is not None, same))
    return found


CASES = [(48,), (30, 18), (1, 40, 7), (12, 12, 12, 12), (3, 2, 25, 18)]


@pytest.mark.parametrize(("world_size", "per_node"), [(4, (4, 2, 1)), (3, (1,)), (6, (6, 3, 2))])
def test_two_levels_equal_the_dense_oracle(world_size: int, per_node: tuple[int, ...]) -> None:
    cases = [(borders_of(*one), kind, near) for one in CASES for kind in PLACEMENTS for near in per_node]
    per_rank = run_ranks(world_size, nodes_on_rank, cases, torch.float64)
    relayed = 0
    for number, (borders, kind, near) in enumerate(cases):
        expected = dense(borders, seed=1)
        for found in (one[number] for one in per_rank):
            rows, values, two_levels, same = found
            assert same and two_levels == per_rank[0][number][2]
            for name, value, whole in zip(("out", "dq", "dk", "dv"), values, expected, strict=True):
                error = (value - whole[torch.from_numpy(rows)]).abs().max().item()
                assert error <= 1e-12, f"{name} off by {error} for {np.diff(borders)} {kind}, {near} a node"
        relayed += per_rank[0][number][2]
    assert relayed >= len(cases) // 4 or per_node == (1,)
