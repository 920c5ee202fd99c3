"""From windows to what one rank feeds its model.

    windows (B of S tokens) -> positions, placement -> this rank's plan -> its tokens, in the plan's order

The first half runs in a loader's worker (`plan_batch`, numpy), the second on the device (`PlannedBatch.to`,
one copy). Windows of a micro-batch lie one after another as a single packed sequence; documents of all of
them are placed together.

Legend: B windows, S tokens a window, T rows of this rank = B * S / context_parallel_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anchor_megatron.attention.plan_tensors import PackedArrays, PlanTensors, plan_arrays, plan_tensors
from anchor_megatron.data.window import Window, WindowCounts
from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.exchanges import plan_exchange
from anchor_megatron.layout.modes import attention_cu_seqlens, positions
from anchor_megatron.layout.placement import balance, place
from anchor_megatron.layout.plan import Plan

__all__ = ["Batch", "BatchStats", "PlannedBatch", "plan_batch"]


@dataclass(frozen=True)
class BatchStats:
    """Figures of one micro-batch for the log; all but `received_tokens` are the same on every
    context-parallel rank.
    """

    counts: WindowCounts  # of its windows together
    area: int  # visible (query, key) pairs
    balance: float  # largest rank's area over the mean
    received_tokens: int  # key/value rows this rank receives in every layer


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device. [1, T] int64 tokens, labels, positions; fp32 loss_mask; bool anchors."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    anchors: Tensor
    plan: PlanTensors


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch on the host, ready to travel."""

    arrays: PackedArrays
    plan: Plan
    stats: BatchStats

    def pin_memory(self) -> PlannedBatch:
        """Page-locked, so that the copy to the device does not block; torch's DataLoader calls it."""
        return replace(self, arrays=self.arrays.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, by one non-blocking copy."""
        arrays = self.arrays.to(device)
        return Batch(
            tokens=arrays["tokens"].long()[None],
            labels=arrays["labels"].long()[None],
            positions=arrays["positions"].long()[None],
            loss_mask=arrays["loss_mask"].float()[None],
            anchors=arrays["anchors"].bool()[None],
            plan=plan_tensors(self.plan, arrays),
        )


def plan_batch(
    windows: Sequence[Window],
    *,
    mode: str,
    placement: str,
    context_parallel_size: int,
    context_parallel_rank: int,
    costs: CostModel = CostModel(),  # noqa: B008
    exchange: str = "sparse",
    ring_rows: int = 1 << 14,
) -> PlannedBatch:
    """This context-parallel rank's share of a micro-batch of equally long `windows`, planned for `exchange`
    (see `layout/exchanges.py`). All options must be the same on all ranks that share it.
    """
    window_length = windows[0].tokens.size
    cu_seqlens = _joined_cu_seqlens(windows)
    spans = attention_cu_seqlens(mode, cu_seqlens, window_length=window_length)
    placed = place(
        placement,
        spans,
        context_parallel_size=context_parallel_size,
        window_length=window_length,
        costs=costs,
    )
    plan = plan_exchange(placed, context_parallel_rank, exchange=exchange, ring_rows=ring_rows, costs=costs)
    whole = {
        "tokens": np.concatenate([window.tokens for window in windows]),
        "labels": np.concatenate([window.labels for window in windows]),
        "loss_mask": np.concatenate([window.loss_mask for window in windows]),
        "positions": positions(mode, cu_seqlens, window_length=window_length, slots=_joined_slots(windows)),
        "anchors": np.zeros(cu_seqlens[-1], dtype=bool),
    }
    whole["anchors"][cu_seqlens[:-1]] = True
    rows = _rows_in_attention_order(mode, whole["positions"], window_length)[plan.token_index]
    arrays = {name: array[rows] for name, array in whole.items()} | plan_arrays(plan)
    return PlannedBatch(PackedArrays.pack(arrays), plan, _stats(windows, spans, balance(placed), plan))


def _joined_cu_seqlens(windows: Sequence[Window]) -> np.ndarray:
    """Document borders of windows laid one after another."""
    offsets = np.cumsum([0] + [window.tokens.size for window in windows])
    parts = [window.cu_seqlens[:-1] + offset for window, offset in zip(windows, offsets, strict=False)]
    return np.concatenate([*parts, offsets[-1:]]).astype(np.int64)


def _joined_slots(windows: Sequence[Window]) -> np.ndarray | None:
    slots = [window.slots for window in windows if window.slots is not None]
    assert len(slots) in (0, len(windows)), "some windows of a micro-batch are interleaved, others not"
    return np.concatenate(slots) if slots else None


def _rows_in_attention_order(mode: str, positions_: np.ndarray, window_length: int) -> np.ndarray:
    """The window's row behind each token of the attention spans: in `full` the one that stands there,
    whatever document it is of, as each sees all before it; in the others documents lie together.
    """
    if mode != "full":
        return np.arange(positions_.size)
    first = np.arange(positions_.size) // window_length * window_length
    return np.argsort(first + positions_)


def _stats(windows: Sequence[Window], spans: np.ndarray, balance_: float, plan: Plan) -> BatchStats:
    counts = [asdict(window.counts) for window in windows]
    lengths = np.diff(spans)
    return BatchStats(
        counts=WindowCounts(**{name: sum(one[name] for one in counts) for name in counts[0]}),
        area=int((lengths * (lengths + 1) // 2).sum()),
        balance=balance_,
        received_tokens=plan.received_tokens,
    )
