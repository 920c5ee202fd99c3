"""Attention over plans against the dense definition in fp64: forward and every gradient, on gloo ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels_cpu import TorchCpuKernel
from anchor_megatron.attention.oracle import dense_attention
from anchor_megatron.attention.plan_tensors import PlanTensors, plan_arrays, plan_tensors
from anchor_megatron.layout.modes import MODES, attention_cu_seqlens, visible
from anchor_megatron.layout.placement import PLACEMENTS, place
from anchor_megatron.layout.plan import Plan, make_plan
from anchor_megatron.testing.ranks import run_ranks

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5
BOUND = 1e-10

# document lengths; every total is a multiple of 12, so that 1, 2, 3 and 4 ranks divide it
CASES = {
    "one document of one token": [1, 59, 60],
    "one document fills the window": [120],
    "hundreds of tiny ones": [1, 2, 1, 1, 3] * 60,
    "a document over all ranks": [5, 102, 13],
    "lengths that divide by nothing": [7, 29, 31, 53],
    "tiny ones behind a giant": [97, *[1] * 23],
}


def to_tensors(plan: Plan) -> PlanTensors:
    return plan_tensors(
        plan, {name: torch.from_numpy(array).int() for name, array in plan_arrays(plan).items()}
    )


def inputs(tokens: int, *, seed: int) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]


def dense(cu_seqlens: np.ndarray, *, seed: int) -> list[torch.Tensor]:
    """Output, dq, dk, dv by the definition."""
    *qkv, dout = inputs(int(cu_seqlens[-1]), seed=seed)
    leaves = [x.requires_grad_() for x in qkv]
    out = dense_attention(*leaves, torch.from_numpy(visible(cu_seqlens)), scale=SCALE)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def attend_on_rank(
    rank: int, world_size: int, cases: list[tuple[np.ndarray, str, int, int]]
) -> list[list[tuple[np.ndarray, torch.Tensor]]]:
    """For each case: the tokens this rank holds, and its rows of output, dq, dk, dv."""
    return [_attend(rank, world_size, *case) for case in cases]


def _attend(
    rank: int, world_size: int, cu_seqlens: np.ndarray, placement: str, window_length: int, seed: int
) -> list[tuple[np.ndarray, torch.Tensor]]:
    placed = place(placement, cu_seqlens, context_parallel_size=world_size, window_length=window_length)
    plan = make_plan(placed, rank)
    q, k, v, dout = (x[torch.from_numpy(plan.token_index)] for x in inputs(int(cu_seqlens[-1]), seed=seed))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = planned_attention(
        *leaves, plan=to_tensors(plan), kernel=TorchCpuKernel(), scale=SCALE, group=dist.group.WORLD
    )
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return [(plan.token_index, x) for x in found]


def assert_equals_dense(world_size: int, cases: list[tuple[np.ndarray, str, int, int]]) -> None:
    per_rank = run_ranks(world_size, attend_on_rank, cases)
    for number, (cu_seqlens, placement, _, seed) in enumerate(cases):
        expected = dense(cu_seqlens, seed=seed)
        for name, which in zip(("out", "dq", "dk", "dv"), range(4), strict=True):
            found = torch.full_like(expected[which], float("nan"))
            for rank in range(world_size):
                rows, values = per_rank[rank][number][which]
                found[torch.from_numpy(rows)] = values
            error = (found - expected[which]).abs().max().item()
            assert error <= BOUND, f"{name} off by {error} for {np.diff(cu_seqlens)} placed {placement}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_named_cases_equal_the_dense_oracle(world_size: int, mode: str) -> None:
    cases = []
    for lengths in CASES.values():
        borders = np.cumsum([0, *lengths]).astype(np.int64)
        spans = attention_cu_seqlens(mode, borders, window_length=int(borders[-1]))
        cases += [(spans, placement, int(borders[-1]), 1) for placement in PLACEMENTS]
    assert_equals_dense(world_size, cases)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    placement=st.sampled_from(PLACEMENTS),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_drawn_lengths_equal_the_dense_oracle(
    world_size: int, lengths: list[int], placement: str, seed: int
) -> None:
    missing = -sum(lengths) % world_size
    cu_seqlens = np.cumsum([0, *lengths, *[1] * missing]).astype(np.int64)
    assert_equals_dense(world_size, [(cu_seqlens, placement, int(cu_seqlens[-1]), seed)])


def test_micro_batches_of_several_windows_equal_the_dense_oracle() -> None:
    two_windows = np.cumsum([0, 13, 20, 3, 36]).astype(np.int64)  # windows of 36 tokens
    assert_equals_dense(4, [(two_windows, placement, 36, 5) for placement in PLACEMENTS])
