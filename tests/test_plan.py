"""How good placements are: shares of a document, bounds that hold, level areas, few rows to receive."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_megatron.layout.bounds import least_received_rows, least_unevenness
from anchor_megatron.layout.cost import CostModel, LayerShape, Machine
from anchor_megatron.layout.cut import Takers, area_of, cut_shares, least_received, peel
from anchor_megatron.layout.placement import PLACEMENTS, Placement, balance, place, received_rows
from anchor_megatron.layout.plan import make_plans
from anchor_megatron.testing.lengths import draw_lengths

TABLE = Path(__file__).parents[1] / "benchmarks" / "document_lengths.csv"


def borders_of(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int64)


def placed(cu_seqlens: np.ndarray, ranks: int) -> Placement:
    return place("document", cu_seqlens, context_parallel_size=ranks, window_length=int(cu_seqlens[-1]))


@given(
    length=st.integers(4, 400),
    parts=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=6),
    received=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    most_received=st.integers(0, 500),
    way=st.sampled_from([(0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.5, 0.0), (1.0, 0.0)]),
)
def test_shares_are_the_document_and_keep_what_they_promise(
    length: int, parts: list[float], received: list[int], most_received: int, way: tuple[float, float]
) -> None:
    caps = [length * (length + 1) / 2 * part / sum(parts) for part in parts]
    takers = Takers(caps, [length] * len(parts), received[: len(parts)])
    shares = cut_shares(length, takers, 0.0, most_received, evenness=way[0], filled=way[1])
    if shares is None:
        return
    held = [
        set(range(early, early_stop)) | set(range(late, late_stop))
        for early, early_stop, late, late_stop in shares
    ]
    assert sum(map(len, held)) == length and set().union(*held) == set(range(length))
    for tokens, cap, before in zip(held, caps, takers.received, strict=True):
        if tokens:
            assert before + max(tokens) + 1 - len(tokens) <= most_received
        assert abs(sum(token + 1 for token in tokens) - cap) <= length * len(parts)  # a token's area each


def test_the_worked_example_of_two_shares() -> None:
    takers = Takers([150.0, 150.0], [24, 24], [0, 0])
    assert cut_shares(24, takers, 0.0, 24, evenness=0.0, filled=0.0) == [(0, 0, 17, 24), (17, 17, 0, 17)]
    assert cut_shares(24, takers, 0.0, 24, evenness=1.0, filled=0.0) == [(0, 6, 18, 24), (18, 18, 6, 18)]
    found = least_received(24, takers, 0.0, 0)
    assert found is not None and found[0] == 10 and found[1] == [(0, 10, 20, 24), (20, 20, 10, 20)]


@given(st.integers(2, 40), st.data())
def test_peel_finds_the_nearest_area(length: int, data: st.DataObject) -> None:
    hole = sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    runs = [(start, stop) for start, stop in ((0, hole[0]), (hole[1], length)) if stop > start]
    tokens = [token for start, stop in runs for token in range(start, stop)]
    if not tokens:
        return
    count = data.draw(st.integers(1, len(tokens)))
    area = data.draw(st.integers(0, length * (length + 1) // 2))
    taken, rest = peel(runs, count, area)
    in_order = [token for start, stop in taken for token in range(start, stop)]
    left = [token for start, stop in rest for token in range(start, stop)]
    assert sorted(in_order + left) == tokens and len(in_order) == count
    assert area_of(taken) == sum(token + 1 for token in in_order)
    options = [sum(t + 1 for t in tokens[at : at + count]) for at in range(len(tokens) - count + 1)]
    assert abs(area_of(taken) - area) == min(abs(option - area) for option in options)


@functools.cache
def all_owners(tokens: int, ranks: int) -> np.ndarray:
    """int64 [ways, tokens]: every way to give all ranks equally many tokens."""
    count = tokens // ranks
    if ranks == 1:
        return np.zeros((1, tokens), dtype=np.int64)
    others = all_owners(tokens - count, ranks - 1) + 1
    found = []
    for first in itertools.combinations(range(tokens), count):
        owner = np.zeros((others.shape[0], tokens), dtype=np.int64)
        owner[:, np.setdiff1d(np.arange(tokens), first)] = others
        found.append(owner)
    return np.concatenate(found)


def all_placements(cu_seqlens: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Unevenness and worst received rows of every way to share out a window's tokens."""
    document = np.repeat(np.arange(cu_seqlens.size - 1), np.diff(cu_seqlens))
    cost = np.arange(cu_seqlens[-1]) - cu_seqlens[document] + 1
    owner = all_owners(int(cu_seqlens[-1]), ranks)
    areas, received = [], []
    for rank in range(ranks):
        held = np.where(owner == rank, cost, 0)
        areas.append(held.sum(axis=1))
        last = np.stack([held[:, document == d].max(axis=1) for d in range(cu_seqlens.size - 1)])
        received.append(last.sum(axis=0) - (held > 0).sum(axis=1))
    return np.max(areas, axis=0) / (cost.sum() / ranks), np.max(received, axis=0)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from([(2, 12), (3, 9), (3, 12), (4, 8)]),
    st.sampled_from([1.0, 1.05, 1.2, 1.5]),
)
def test_no_placement_beats_the_bounds(lengths: list[int], size: tuple[int, int], unevenness: float) -> None:
    ranks, most = size
    inner = [end for end in np.cumsum(lengths).tolist() if end < most]
    tokens = max(ranks, (inner[-1] if inner else most) // ranks * ranks)
    cu_seqlens = np.array([0, *(end for end in inner if end < tokens), tokens])
    uneven, received = all_placements(cu_seqlens, ranks)
    assert uneven.min() >= least_unevenness(cu_seqlens, ranks) - 1e-9
    allowed = received[uneven <= unevenness + 1e-9]
    if allowed.size:
        assert allowed.min() >= least_received_rows(cu_seqlens, ranks, unevenness=unevenness)


def test_the_bound_on_rows_is_worth_something() -> None:
    assert least_received_rows(borders_of(*[16] * 8), 4, unevenness=1.0) == 0
    assert least_received_rows(borders_of(12, 4), 2, unevenness=1.1) == 4  # as in the docstring
    assert least_received_rows(borders_of(16384), 4, unevenness=1.02) == 12288  # the zigzag's


@pytest.mark.parametrize(
    ("ranks", "most", "seed"),
    [(2, 0.25, 3), (4, 0.26, 3), (8, 0.23, 3), (16, 0.24, 3), (32, 0.26, 3), (64, 0.2, 3)],
)
def test_real_lengths_are_level_and_send_little(ranks: int, most: float, seed: int) -> None:
    tokens = 16384 * ranks
    for window in range(seed):
        cu_seqlens = borders_of(*draw_lengths(TABLE, tokens=tokens, longest=tokens // 4, seed=window))
        placement = placed(cu_seqlens, ranks)
        assert balance(placement) <= 1.02
        rows = int(received_rows(placement).max())
        assert rows <= most * (tokens - tokens // ranks)
        assert rows >= least_received_rows(cu_seqlens, ranks, unevenness=1.02)


HARD = {
    "410 documents of 20 tokens": ([20] * 410, 10),
    "one token documents": ([1] * 4096, 16),
    "one giant and a thousand dwarfs": ([9240, *[1] * 1000], 8),
    "a giant that fits one rank's tokens, not its area": ([1024, *[1] * 7168], 8),
    "five long documents and nothing else": ([85721, 76324, 64846, 22167, 13086], 64),
    "eight equal documents on three ranks": ([3000] * 8, 3),
    "one document more than ranks": ([1000] * 17, 17 * 2),
    "two giants": ([8192, 8192, *[7] * 1170, 2], 12),
    "lengths that halve": ([2**power for power in range(15)] + [1], 8),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_windows_are_level(name: str) -> None:
    lengths, ranks = HARD[name]
    cu_seqlens = borders_of(*lengths)
    assert balance(placed(cu_seqlens, ranks)) <= 1.03 * least_unevenness(cu_seqlens, ranks)


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_received_rows_are_those_of_the_plans(kind: str) -> None:
    cu_seqlens = borders_of(5, 9, 1, 40, 9)
    placement = place(kind, cu_seqlens, context_parallel_size=4, window_length=64)
    assert received_rows(placement).tolist() == [sum(plan.recv_counts) for plan in make_plans(placement)]


def test_placing_is_a_function_of_the_documents() -> None:
    cu_seqlens = borders_of(*draw_lengths(TABLE, tokens=2**17, longest=2**15, seed=7))
    first, again = placed(cu_seqlens, 8), placed(cu_seqlens.copy(), 8)
    assert np.array_equal(first.start, again.start) and np.array_equal(first.rank, again.rank)


def test_costs_count_whole_tiles() -> None:
    machine = Machine(
        forward_tflops=4e-12, backward_tflops=10e-12, forward_row_pairs=0, backward_row_pairs=1, tile=4
    )
    costs = CostModel(machine, LayerShape(heads=1, groups=1, head_dim=1))
    queries, keys, rank = np.array([4, 2, 6]), np.array([4, 9, 6]), np.array([0, 2, 2])
    # 1+2+3+4; 8+9 and two rows of padding that see 9; 1+..+6 and two that see 6
    pairs = np.array([10.0, 0.0, 17 + 18 + 21 + 12])
    assert costs.forward_seconds(queries, keys).tolist() == [10.0, 17 + 18, 21 + 12]
    assert costs.attention_seconds(queries, keys, rank, 3).tolist() == (2 * pairs + [4, 0, 12]).tolist()
