"""Placements on several nodes: rows that cross them are counted right, and split documents stay in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_megatron.layout.bounds import least_unevenness
from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.placement import PLACEMENTS, Placement, balance, place, placement_traffic
from anchor_megatron.layout.plan import check_plans, make_plans
from anchor_megatron.testing.lengths import draw_lengths

TABLE = Path(__file__).parents[1] / "benchmarks" / "document_lengths.csv"


def borders_of(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int64)


def placed(cu_seqlens: np.ndarray, ranks: int, per_node: int | None, kind: str = "document") -> Placement:
    return place(
        kind,
        cu_seqlens,
        context_parallel_size=ranks,
        window_length=int(cu_seqlens[-1]),
        costs=CostModel(ranks_per_node=per_node),
    )


def crossing_documents(placement: Placement, per_node: int) -> np.ndarray:
    """Documents with tokens on more than one node."""
    pairs = np.unique(np.stack([placement.document, placement.rank // per_node]), axis=1)
    documents, nodes = np.unique(pairs[0], return_counts=True)
    return documents[nodes > 1]


@st.composite
def topologies(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Any documents on one to four nodes of one to four ranks."""
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    tokens = nodes * per_node * draw(st.integers(1, 40))
    inner = draw(st.sets(st.integers(1, tokens - 1), max_size=60)) if tokens > 1 else set()
    return np.array(sorted({0, tokens} | inner)), nodes * per_node, per_node


@given(topologies(), st.sampled_from(PLACEMENTS))
def test_traffic_is_that_of_whole_plans(topology: tuple[np.ndarray, int, int], kind: str) -> None:
    cu_seqlens, ranks, per_node = topology
    placement = placed(cu_seqlens, ranks, per_node, kind)
    plans = make_plans(placement)
    check_plans(placement, plans)
    moved = placement_traffic(placement, ranks_per_node=per_node)
    assert moved.received.tolist() == [sum(plan.recv_counts) for plan in plans]
    assert moved.sent.tolist() == [sum(plan.send_counts) for plan in plans]
    node = np.arange(ranks) // per_node
    counts = np.array([plan.recv_counts for plan in plans])
    assert moved.crossing.tolist() == (counts * (node[:, None] != node)).sum(axis=1).tolist()
    rows_to = np.array([plan.send_counts for plan in plans]) * (node[:, None] != node)
    assert moved.crossing_sent.tolist() == rows_to.sum(axis=1).tolist()
    arriving = [arriving_tokens(plans, rank, node) for rank in range(ranks)]
    once = [
        len(set().union(*(arriving[rank] for rank in np.flatnonzero(node == n))))
        for n in range(ranks // per_node)
    ]
    assert moved.node_crossing.tolist() == once


def arriving_tokens(plans: list, rank: int, node: np.ndarray) -> set[int]:
    """Tokens that ranks of other nodes send to this one."""
    found: set[int] = set()
    for source, plan in enumerate(plans):
        begin = sum(plan.send_counts[:rank])
        rows = plan.send_index[begin : begin + plan.send_counts[rank]]
        if node[source] != node[rank]:
            found |= set(plan.token_index[rows].tolist())
    return found


@given(
    nodes=st.integers(2, 5),
    per_node=st.sampled_from([2, 4, 8]),
    share=st.sampled_from([2, 4, 8]),
    tokens=st.integers(16, 200),
)
def test_documents_of_part_of_a_node_stay_in_one(nodes: int, per_node: int, share: int, tokens: int) -> None:
    """Equal documents, each as large as some ranks of a node."""
    share = min(share, per_node)
    cu_seqlens = borders_of(*[tokens * share] * (nodes * per_node // share))
    placement = placed(cu_seqlens, nodes * per_node, per_node)
    assert crossing_documents(placement, per_node).size == 0
    assert balance(placement) <= 1.03 * least_unevenness(cu_seqlens, nodes * per_node) + 8 / tokens


@pytest.mark.parametrize("ranks", [32, 64])
def test_on_real_lengths_what_fits_a_node_stays_there(ranks: int) -> None:
    for seed in range(4):
        lengths = draw_lengths(TABLE, tokens=16384 * ranks, longest=4096 * ranks, seed=seed)
        cu_seqlens = borders_of(*lengths)
        anywhere, near = (placed(cu_seqlens, ranks, per_node) for per_node in (None, 8))
        assert balance(near) <= 1.03
        areas = lengths * (lengths + 1) / 2
        fits = (areas <= areas.sum() / (ranks // 8)) & (lengths <= 8 * 16384)
        crossing = [crossing_documents(placement, 8) for placement in (anywhere, near)]
        tokens = [int(lengths[found[fits[found]]].sum()) for found in crossing]
        assert tokens[1] <= 0.02 * lengths.sum() and tokens[1] < tokens[0]
        once = [placement_traffic(one, ranks_per_node=8).node_crossing.sum() for one in (anywhere, near)]
        assert once[1] < once[0]


@settings(max_examples=30)
@given(topologies())
def test_one_node_is_no_topology(topology: tuple[np.ndarray, int, int]) -> None:
    cu_seqlens, ranks, _ = topology
    plain, one = (placed(cu_seqlens, ranks, per_node) for per_node in (None, 16))
    assert np.array_equal(plain.rank, one.rank) and np.array_equal(plain.start, one.start)
    assert not placement_traffic(plain).crossing.any()


def test_nodes_must_divide_the_ranks() -> None:
    with pytest.raises(
        ValueError, match="context_parallel_size: got 6, expected a multiple of ranks_per_node = 4"
    ):
        placed(borders_of(5, 7), 6, 4)
