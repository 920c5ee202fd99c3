"""The exchanges ring and ulysses: rounds that meet every visible pair once within their bound, and both
executed to the dense oracle's result.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import BOUND, CASES, HEAD_DIM, SCALE, dense, inputs

from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels_cpu import TorchCpuKernel
from anchor_megatron.attention.plan_tensors import plan_arrays, plan_tensors
from anchor_megatron.layout.cost import CostModel, Machine
from anchor_megatron.layout.exchanges import plan_exchange
from anchor_megatron.layout.modes import MODES, attention_cu_seqlens, visible
from anchor_megatron.layout.placement import PLACEMENTS, Placement, place, received_rows
from anchor_megatron.layout.plan import Round, make_plan
from anchor_megatron.layout.rounds import make_rounds
from anchor_megatron.testing.ranks import run_ranks

Case = tuple[np.ndarray, str, str, int]  # borders, placement, exchange, rows of a round


def arriving(rounds: list[list[Round]], tokens: list[np.ndarray], rank: int, number: int) -> np.ndarray:
    """Tokens that `rank` receives in a round, as the senders send them."""
    parts = []
    for source, own in enumerate(rounds):
        plan = own[number].plan
        begin = sum(plan.send_counts[:rank])
        rows = plan.send_index[begin : begin + plan.send_counts[rank]]
        assert rows.size == rounds[rank][number].plan.recv_counts[source], "sent is not received"
        parts.append(tokens[source][rows])
    return np.concatenate(parts)


def met_pairs(placed: Placement, rows: int) -> np.ndarray:
    """How often every (query, key) pair is met by the local pieces and all rounds of all ranks, of at most
    `rows` rows.
    """
    ranks, size = placed.context_parallel_size, int(placed.cu_seqlens[-1])
    plans = [make_plan(placed, rank) for rank in range(ranks)]
    count = -(-int(received_rows(placed).max()) // rows)
    rounds = [make_rounds(placed, rank, rounds=count) for rank in range(ranks)]
    tokens = [plan.token_index for plan in plans]
    met = np.zeros((size, size), dtype=int)
    assert len({len(own) for own in rounds}) == 1, "all ranks take part in every round"
    for rank, plan in enumerate(plans):
        for first, end in zip(plan.cu_seqlens_local, plan.cu_seqlens_local[1:], strict=False):
            held = tokens[rank][first:end]
            met[np.ix_(held, held)] += np.tri(end - first, dtype=int)
        sizes = [arriving(rounds, tokens, rank, number).size for number in range(1, count + 1)]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1, "rows are not spread over the rounds"
        for number, one in enumerate(rounds[rank]):
            got = arriving(rounds, tokens, rank, number)
            assert got.size <= rows, f"got {got.size} rows in a round, expected at most {rows}"
            used = np.unique(one.plan.key_index[one.plan.key_index >= tokens[rank].size])
            assert used.size == got.size, "a received row is not needed"
            keys = np.concatenate([tokens[rank], got])[one.plan.key_index]
            queries = tokens[rank][plan.local_tokens :][one.query_index]
            q_ends, k_ends = one.plan.cu_seqlens_q, one.plan.cu_seqlens_k
            for piece in range(q_ends.size - 1):
                asked = queries[q_ends[piece] : q_ends[piece + 1]]
                seen = keys[k_ends[piece] : k_ends[piece + 1]]
                block = np.ones((asked.size, seen.size), dtype=int)
                met[np.ix_(asked, seen)] += np.tril(block, seen.size - asked.size) if number == 0 else block
    return met


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    placement=st.sampled_from(PLACEMENTS),
    rows=st.integers(1, 40),
)
def test_every_visible_pair_is_met_once(lengths: list[int], ranks: int, placement: str, rows: int) -> None:
    borders = np.cumsum([0, *lengths, *[1] * (-sum(lengths) % ranks)]).astype(np.int64)
    placed = place(placement, borders, context_parallel_size=ranks, window_length=int(borders[-1]))
    assert np.array_equal(met_pairs(placed, rows), visible(borders).astype(int))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    placement=st.sampled_from(PLACEMENTS),
    rows=st.integers(1, 60),
    ranks_per_node=st.sampled_from([2, 4, None]),
)
def test_no_rank_receives_too_much_at_a_time(
    lengths: list[int], placement: str, rows: int, ranks_per_node: int | None
) -> None:
    """And there are rounds only where it would: else the plan is the sparse exchange's."""
    borders = np.cumsum([0, *lengths, *[1] * (-sum(lengths) % 8)]).astype(np.int64)
    costs = CostModel(Machine(latency_us=0), ranks_per_node=ranks_per_node)
    placed = place(placement, borders, context_parallel_size=8, window_length=int(borders[-1]))
    options = dict(ring_rows=rows, costs=costs)
    ring, sparse = (
        [plan_exchange(placed, rank, exchange=exchange, **options) for rank in range(8)]
        for exchange in ("ring", "sparse")
    )
    assert len({len(plan.rounds) for plan in ring}) == 1 and len({plan.relay is None for plan in ring}) == 1
    if received_rows(placed).max() > rows:
        at_once = [one.plan for plan in ring for one in plan.rounds]
        assert all(plan.rounds for plan in ring)
    else:
        at_once = ring
        two_levels = [sum(plan.recv_counts + plan.relay.recv_counts) for plan in sparse if plan.relay]
        assert (ring[0].relay is None) == (max(two_levels, default=rows + 1) > rows)
    assert (
        max(sum(plan.recv_counts + (plan.relay.recv_counts if plan.relay else ())) for plan in at_once)
        <= rows
    )


def attend_on_rank(
    rank: int, world_size: int, cases: list[Case], dtype: torch.dtype
) -> list[tuple[np.ndarray, list[torch.Tensor]]]:
    """For each case: the tokens this rank holds, and its rows of output, dq, dk, dv."""
    found = []
    for borders, placement, exchange, rows in cases:
        window = int(borders[-1])
        placed = place(placement, borders, context_parallel_size=world_size, window_length=window)
        plan = plan_exchange(placed, rank, exchange=exchange, ring_rows=rows)
        arrays = {name: torch.from_numpy(x).int() for name, x in plan_arrays(plan).items()}
        mine = torch.from_numpy(plan.token_index)
        *leaves, dout = (x[mine].to(dtype).requires_grad_() for x in inputs(window, seed=1))
        out = planned_attention(
            *leaves,
            plan=plan_tensors(plan, arrays),
            kernel=TorchCpuKernel(),
            scale=SCALE,
            group=dist.group.WORLD,
        )
        found.append((plan.token_index, [out.detach(), *torch.autograd.grad(out, leaves, dout.detach())]))
    return found


def attended(world_size: int, cases: list[Case], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Whole output, dq, dk, dv of each case."""
    per_rank = run_ranks(world_size, attend_on_rank, cases, dtype)
    whole = []
    for number, (borders, *_) in enumerate(cases):
        parts = [torch.full_like(x, float("nan")) for x in inputs(int(borders[-1]), seed=1)]
        parts = [parts[3], parts[0], parts[1], parts[2]]
        for rank in range(world_size):
            rows, values = per_rank[rank][number]
            for part, value in zip(parts, values, strict=True):
                part[torch.from_numpy(rows)] = value.double()
        whole.append(parts)
    return whole


def assert_dense(cases: list[Case], world_size: int) -> None:
    for case, found in zip(cases, attended(world_size, cases, torch.float64), strict=True):
        for name, one, expected in zip(("out", "dq", "dk", "dv"), found, dense(case[0], seed=1), strict=True):
            error = (one - expected).abs().max().item()
            assert error <= BOUND, f"{name} off by {error} for {np.diff(case[0])} {case[1:]}"


def named_cases(exchange: str) -> list[Case]:
    cases: list[Case] = []
    for mode in MODES:
        for number, lengths in enumerate(CASES.values()):
            borders = np.cumsum([0, *lengths]).astype(np.int64)
            spans = attention_cu_seqlens(mode, borders, window_length=int(borders[-1]))
            cases += [(spans, placement, exchange, 5 + 17 * (number % 3)) for placement in PLACEMENTS]
    return cases


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rounds_equal_the_dense_oracle(world_size: int) -> None:
    assert_dense(named_cases("ring"), world_size)


@pytest.mark.parametrize("world_size", [2, 4])  # of 4 query and 2 key/value heads: 1 and 2 copies of a head
def test_heads_exchanged_equal_the_dense_oracle(world_size: int) -> None:
    assert_dense(named_cases("ulysses"), world_size)


def uneven_on_rank(rank: int, world_size: int) -> tuple[float, bool, str]:
    """12 query and 4 key/value heads: a rank's 4 query heads read 2 of those unevenly. Largest difference
    from one rank's gradients, whether the output is the same bit for bit, and what 8 query heads end in.
    """
    borders = np.array([0, 20, 48])
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(48, n, HEAD_DIM, generator=generator) for n in (12, 4, 4, 12)]
    results = []
    for ranks in (1, world_size):
        placed = place("contiguous", borders, context_parallel_size=ranks, window_length=48)
        plan = plan_exchange(placed, rank % ranks, exchange="ulysses", ring_rows=1)
        arrays = {name: torch.from_numpy(x).int() for name, x in plan_arrays(plan).items()}
        tensors = plan_tensors(plan, arrays)
        mine = torch.from_numpy(plan.token_index)
        *leaves, dout = (x[mine].requires_grad_() for x in whole)
        options = dict(plan=tensors, kernel=TorchCpuKernel(), scale=SCALE)
        out = planned_attention(*leaves, **options, group=dist.group.WORLD)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout.detach())))
    one, ours = results
    message = ""
    try:
        planned_attention(*(x[:, :8] for x in leaves), **options, group=dist.group.WORLD)
    except ValueError as error:
        message = str(error)
    difference = max(float((x - y[mine]).abs().max()) for x, y in zip(ours[1:], one[1:], strict=True))
    return difference, torch.equal(ours[0], one[0][mine]), message


def test_heads_that_are_shared_unevenly() -> None:
    for difference, same, message in run_ranks(3, uneven_on_rank):
        assert same and difference <= 1e-5, (same, difference)
        assert message == "exchange ulysses: got 8 query heads, expected a multiple of the 3 ranks"


def test_the_output_over_heads_is_one_ranks_bit_for_bit() -> None:
    """In bf16, where 4 ranks share 2 key/value heads. (The sparse exchange's is too with GPU kernels, not
    with this one, whose blocks begin where a piece does.)
    """
    borders = np.array([0, 100, 1200])
    whole = attended(1, [(borders, "document", "sparse", 0)], torch.bfloat16)[0][0]
    cases: list[Case] = [(borders, placement, "ulysses", 0) for placement in PLACEMENTS]
    for case, found in zip(cases, attended(4, cases, torch.bfloat16), strict=True):
        assert torch.equal(found[0], whole), case[1:]


def parts_on_rank(rank: int, world_size: int, placement: Placement) -> bool:
    """Whether heads that travel in parts give the same, bit for bit, as all at once."""
    plan = make_plan(placement, rank)
    arrays = {name: torch.from_numpy(x).int() for name, x in plan_arrays(plan).items()}
    mine = torch.from_numpy(plan.token_index)
    *leaves, dout = (x[mine].bfloat16().requires_grad_() for x in inputs(1200, seed=1))
    results = []
    for parts in ((1, 1), (1, 2), (2, 2), (2, 8)):  # of 2 key/value heads
        tensors = plan_tensors(dataclasses.replace(plan, head_parts=parts), arrays)
        options = dict(plan=tensors, kernel=TorchCpuKernel(), scale=SCALE, group=dist.group.WORLD)
        out = planned_attention(*leaves, **options)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout.detach())])
    return all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_heads_in_parts_are_the_same_bit_for_bit() -> None:
    placement = place("zigzag", np.array([0, 100, 1200]), context_parallel_size=4, window_length=1200)
    assert all(run_ranks(4, parts_on_rank, placement))


def test_merging_costs_less_than_another_rounding() -> None:
    """In bf16, against fp64 on the same bf16 inputs: at most twice the sparse exchange's error."""
    borders = np.array([0, 480, 2040])
    cases: list[Case] = [(borders, "contiguous", "sparse", 0), (borders, "contiguous", "ring", 64)]
    sparse, ring = (found[0] for found in attended(4, cases, torch.bfloat16))
    *qkv, _ = (x.bfloat16().double() for x in inputs(2040, seed=1))
    scores = torch.einsum("tnh,knh->ntk", qkv[0], qkv[1].repeat_interleave(2, dim=1)) * SCALE
    scores.masked_fill_(~torch.from_numpy(visible(borders)), float("-inf"))
    expected = torch.einsum("ntk,knh->tnh", scores.softmax(-1), qkv[2].repeat_interleave(2, dim=1))
    errors = [float((found - expected).norm() / expected.norm()) for found in (sparse, ring)]
    assert 0 < errors[1] <= 2 * errors[0], errors
