"""Context parallelism measured on the ranks at hand: every size that divides them, placement and exchange.

One row is one window on one number of ranks; where there are more ranks, they do the same in groups. Each is
taken apart by stand-in kernels (`stand_ins.py`):

    total       the layer as it is
    attention   the kernel calls it made, again, alone
    exchange    the layer with a kernel that computes nothing: transfers, and rows packed, gathered, summed
    hidden      what of the exchange the total does not show: attention + exchange - total

Figures are medians over the repeats of the slowest rank's milliseconds, forward and backward, and their sum:
in training all layers' forward passes come before any backward pass, and ranks wait for each other in every
layer.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels import Kernel
from anchor_megatron.attention.plan_tensors import PackedArrays, plan_arrays, plan_tensors
from anchor_megatron.layout.cost import CostModel, LayerShape, Machine
from anchor_megatron.layout.exchanges import Way, find_way, plan_exchange
from anchor_megatron.layout.placement import Placement, balance
from anchor_megatron.profiling.clock import slowest, timed
from anchor_megatron.profiling.predict import Prediction, predict, predict_way
from anchor_megatron.profiling.stand_ins import NoAttention, Remembered

__all__ = ["Case", "Sample", "groups_by_size", "measure", "measure_total"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A window, placed as `kind` says by `costs`, and the most rows of a round of `ring`. `group` holds this
    rank and the others; None: it is alone.
    """

    kind: str
    placement: Placement
    exchange: str
    costs: CostModel
    ring_rows: int
    group: dist.ProcessGroup | None

    @property
    def shape(self) -> LayerShape:
        """Heads of a rank."""
        return self.costs.shape

    @property
    def ranks(self) -> int:
        """Context-parallel ranks."""
        return self.placement.context_parallel_size

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return dist.get_rank(self.group) if self.group is not None else 0

    @functools.cached_property
    def way(self) -> Way:
        """How its rows travel."""
        return find_way(self.placement, exchange=self.exchange, ring_rows=self.ring_rows, costs=self.costs)

    def predicted(self, machine: Machine) -> Prediction:
        """The prediction by a machine's rates, for the way that the case's own costs chose."""
        costs = replace(self.costs, machine=machine)
        if self.exchange != "ulysses":
            return predict_way(self.way, self.placement, costs)
        found = predict(self.exchange, self.placement, costs, ring_rows=self.ring_rows)
        assert found is not None, f"{self.exchange} runs on {self.ranks} ranks, so it can be predicted"
        return found


@dataclass(frozen=True)
class Sample:
    """What calibration learns from: a case, and median milliseconds [2, ranks] as in `Prediction`."""

    case: Case
    attention: np.ndarray
    exchange: np.ndarray
    total: np.ndarray


def groups_by_size(sizes: list[int]) -> dict[int, dist.ProcessGroup | None]:
    """This rank's group of every size; neighbours form a group. All ranks call it together."""
    found: dict[int, dist.ProcessGroup | None] = {}
    for size in sizes:
        if size == 1:
            found[1] = None
            continue
        for first in range(0, dist.get_world_size(), size):
            members = list(range(first, first + size))
            group = dist.new_group(members, pg_options=_options())
            if dist.get_rank() in members:
                found[size] = group
    return found


def _options() -> Any:
    """As in training: transfers go before kernels."""
    if dist.get_backend() != "nccl":
        return None
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def measure(
    case: Case, kernel: Kernel, *, device: torch.device, repeats: int
) -> tuple[dict[str, Any], Sample]:
    """The row of a case, and its sample. All ranks call it together."""
    leaves = _leaves(case, device)
    layer = partial(timed, device=device, repeats=repeats)
    remembered = Remembered(kernel)
    with_memory = _attention(case, remembered, device)
    out = with_memory(*leaves)
    out.backward(torch.randn_like(out))
    alone = layer(
        [
            lambda: remembered.replay(remembered.forwards),
            lambda: remembered.replay(remembered.backwards),
        ]
    )
    remembered.forget()
    del out
    exchange = layer(_passes(_attention(case, NoAttention(), device), leaves))
    total = layer(_passes(_attention(case, kernel, device), leaves))
    gc.collect()
    sample = Sample(case, *(_by_rank(one, case) for one in (alone, exchange, total)))
    return _row(case, alone, exchange, total), sample


def measure_total(
    attend: Attention, tokens: int, shape: LayerShape, *, device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds of another implementation on `tokens` rows of this rank."""
    leaves = _random_leaves(tokens, shape, device)
    forward, backward = slowest(timed(_passes(attend, leaves), device=device, repeats=repeats)).tolist()
    return {"forward_ms": forward, "backward_ms": backward, "total_ms": forward + backward}


def _attention(case: Case, kernel: Any, device: torch.device) -> Attention:
    plan = plan_exchange(
        case.placement, case.rank, exchange=case.exchange, ring_rows=case.ring_rows, costs=case.costs
    )
    tensors = plan_tensors(plan, PackedArrays.pack(plan_arrays(plan)).to(device))
    return partial(
        planned_attention, plan=tensors, kernel=kernel, scale=case.shape.head_dim**-0.5, group=case.group
    )


def _leaves(case: Case, device: torch.device) -> list[Tensor]:
    return _random_leaves(int(case.placement.cu_seqlens[-1]) // case.ranks, case.shape, device)


def _random_leaves(tokens: int, shape: LayerShape, device: torch.device) -> list[Tensor]:
    """Queries, keys and values of a rank; zeros would run faster than real data."""
    generator = torch.Generator(device=device).manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        torch.randn(
            tokens, heads, shape.head_dim, device=device, dtype=dtype, generator=generator
        ).requires_grad_()
        for heads in (shape.heads, shape.groups, shape.groups)
    ]


def _passes(attend: Attention, leaves: list[Tensor]) -> list[Callable[[], None]]:
    """A forward and a backward pass."""
    state: dict[str, Tensor] = {"gradient": torch.randn_like(leaves[0])}

    def forward() -> None:
        for leaf in leaves:
            leaf.grad = None
        state["out"] = attend(*leaves)

    def backward() -> None:
        state.pop("out").backward(state["gradient"])

    return [forward, backward]


def _by_rank(figures: np.ndarray, case: Case) -> np.ndarray:
    """Medians [2, ranks] of the first group."""
    return np.median(figures[: case.ranks], axis=1).T


def _row(case: Case, alone: np.ndarray, exchange: np.ndarray, total: np.ndarray) -> dict[str, Any]:
    """Milliseconds of the slowest rank, and what the exchange brings the worst rank in the forward pass."""
    forward, backward = slowest(total).tolist()
    attention, transfer = (float(slowest(figures).sum()) for figures in (alone, exchange))
    tokens = int(case.placement.cu_seqlens[-1])
    # as rows: ulysses moves queries and outputs too
    received = float(case.predicted(case.costs.machine).received.max())
    by_rank = np.median(alone.sum(axis=2), axis=1)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "total_ms": forward + backward,
        "attention_ms": attention,
        "exchange_ms": transfer,
        "hidden_ms": float(np.clip(attention + transfer - forward - backward, 0, transfer)),
        "attention_ms_by_rank": by_rank[: case.ranks].tolist(),
        "balance": balance(case.placement),
        "received": received / max(1, tokens - tokens // case.ranks),
        "megabytes": received * case.shape.row_bytes / 1e6,
    }
