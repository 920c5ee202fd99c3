"""How good placements are: shares of a document, bounds that hold, level areas, few rows to receive."""

from __future__ import annotations

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


def all_placements(cu_seqlens: np.ndarray) -> list[tuple[float, int]]:
    """Unevenness and worst received rows of every way to halve a window's tokens between two ranks."""
    tokens = int(cu_seqlens[-1])
    document = np.repeat(np.arange(cu_seqlens.size - 1), np.diff(cu_seqlens))
    cost = np.arange(tokens) - cu_seqlens[document] + 1
    found = []
    for chosen in itertools.combinations(range(tokens), tokens // 2):
        of_first = np.isin(np.arange(tokens), chosen)
        areas, received = [], []
        for mine in (of_first, ~of_first):
            areas.append(cost[mine].sum())
            needed = [
                cost[mine & (document == d)].max(initial=0) - (mine & (document == d)).sum()
                for d in range(cu_seqlens.size - 1)
            ]
            received.append(sum(needed))
        found.append((max(areas) / (sum(areas) / 2), max(received)))
    return found


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([1.0, 1.05, 1.2, 1.5]))
def test_no_placement_beats_the_bounds(lengths: list[int], unevenness: float) -> None:
    lengths = [*lengths, 1] if sum(lengths) % 2 else lengths
    while sum(lengths) > 12:
        lengths = lengths[1:] if sum(lengths[1:]) % 2 == 0 and lengths[1:] else [12]
    cu_seqlens = borders_of(*lengths)
    found = all_placements(cu_seqlens)
    assert min(one[0] for one in found) >= least_unevenness(cu_seqlens, 2) - 1e-9
    allowed = [rows for even, rows in found if even <= unevenness + 1e-9]
    if allowed:
        assert min(allowed) >= least_received_rows(cu_seqlens, 2, unevenness=unevenness)


def test_the_bound_on_rows_is_worth_something() -> None:
    whole = borders_of(16384)
    assert least_received_rows(borders_of(*[16] * 8), 4, unevenness=1.0) == 0
    assert 12288 - 1024 < least_received_rows(whole, 4, unevenness=1.02) <= 12288  # 12,288 is the zigzag's


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
