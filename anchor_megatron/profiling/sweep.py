"""The measured table: every workload, shape, number of ranks, placement and exchange, beside the prediction.

A window is first measured on one rank, of which efficiency is counted, then on every number of ranks.
TransformerEngine's context parallelism runs beside ours where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from anchor_megatron.attention.choose import choose_kernel
from anchor_megatron.layout.cost import CostModel, LayerShape, Machine
from anchor_megatron.layout.placement import Placement, place
from anchor_megatron.profiling.calibrate import calibrate
from anchor_megatron.profiling.measure import Case, Sample, groups_by_size, measure, measure_total
from anchor_megatron.profiling.table import PREDICTIONS
from anchor_megatron.profiling.windows import draw_window
from anchor_megatron.testing.lengths import workload_lengths

__all__ = ["Sweep", "add_predictions", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What to measure. A window has `total_tokens`, or `tokens_per_rank` a rank where that is None."""

    lengths: Path
    workloads: list[str]
    shapes: list[LayerShape]
    sizes: list[int]
    placements: list[str]
    exchanges: list[str]
    tokens_per_rank: int
    total_tokens: int | None
    parts: int
    repeats: int
    device: torch.device
    before: Machine  # whose rates places documents, and stays where nothing is measured
    ranks_per_node: int | None
    ring_rows: int

    def borders(self, workload: str, ranks: int) -> np.ndarray:
        """Document borders of a workload's window."""
        tokens = self.total_tokens or self.tokens_per_rank * ranks
        if workload == "file":
            return draw_window(self.lengths, tokens=tokens, longest=tokens // self.parts, seed=0)
        return np.cumsum(np.append(0, workload_lengths(workload, tokens, table=self.lengths))).astype(
            np.int64
        )


Said = Callable[[list[dict[str, Any]]], None]


def sweep(settings: Sweep, said: Said) -> tuple[list[dict[str, Any]], list[Sample]]:
    """Rows and samples; `said` is given all rows after each, so that a run cut short keeps them."""
    groups = groups_by_size([size for size in settings.sizes if size > 1])
    rows: list[dict[str, Any]] = []
    samples: list[Sample] = []
    for shape in settings.shapes:
        for workload in settings.workloads:
            alone: dict[int, float] = {}  # milliseconds on one rank by the window's tokens
            for size in settings.sizes:
                cu_seqlens = settings.borders(workload, size)
                tokens = int(cu_seqlens[-1])
                for case in _cases(settings, cu_seqlens, shape, groups, size, alone):
                    row, sample = _measured(settings, case)
                    if case.ranks == 1:
                        alone[tokens] = row["total_ms"]
                    row["efficiency"] = alone[tokens] / case.ranks / row["total_ms"]
                    rows.append({"workload": workload, "tokens": tokens, **row})
                    samples.append(sample)
                    said(rows)
                if size > 1 and _has_transformer_engine(settings):
                    row = _transformer_engine(settings, cu_seqlens, shape, groups[size])
                    row["efficiency"] = alone[tokens] / size / row["total_ms"]
                    rows.append({"workload": workload, "tokens": tokens, **row})
                    said(rows)
    return rows, samples


def _cases(
    settings: Sweep,
    cu_seqlens: np.ndarray,
    shape: LayerShape,
    groups: dict[int, dist.ProcessGroup | None],
    size: int,
    alone: dict[int, float],
) -> Iterator[Case]:
    """One rank, where the window was not yet measured there, then every placement and exchange."""
    tokens = int(cu_seqlens[-1])
    costs = CostModel(settings.before, shape, settings.ranks_per_node)

    def placed(kind: str, ranks: int) -> Placement:
        return place(kind, cu_seqlens, context_parallel_size=ranks, window_length=tokens, costs=costs)

    if tokens not in alone:
        yield Case("document", placed("document", 1), "sparse", costs, settings.ring_rows, None)
    if size == 1:
        return
    for kind in settings.placements:
        for exchange in settings.exchanges:
            if exchange != "ulysses" or (kind == settings.placements[0] and shape.heads % size == 0):
                yield Case(kind, placed(kind, size), exchange, costs, settings.ring_rows, groups[size])


def _measured(settings: Sweep, case: Case) -> tuple[dict[str, Any], Sample]:
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    kernel = choose_kernel("auto", device=settings.device, dtype=dtype, head_dim=case.shape.head_dim)
    row, sample = measure(case, kernel, device=settings.device, repeats=settings.repeats)
    who = {"name": "ours", "placement": case.kind, "exchange": case.exchange, "kernel": kernel.name}
    return {"ranks": case.ranks, "heads": _heads(case.shape), **who, **row}, sample


def _has_transformer_engine(settings: Sweep) -> bool:
    return settings.device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def _transformer_engine(
    settings: Sweep, cu_seqlens: np.ndarray, shape: LayerShape, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    from anchor_megatron.testing import peers

    assert group is not None, "several ranks have a group"
    attend, held = peers.transformer_engine_thd_cp(
        np.diff(cu_seqlens), heads=shape.heads, groups=shape.groups, head_dim=shape.head_dim, group=group
    )
    figures = measure_total(attend, held.numel(), shape, device=settings.device, repeats=settings.repeats)
    who = {"name": "TransformerEngine THD", "placement": "every document", "exchange": "p2p"}
    return {"ranks": group.size(), "heads": _heads(shape), **who, **figures}


def _heads(shape: LayerShape) -> str:
    return f"{shape.heads}/{shape.groups}"


def add_predictions(rows: list[dict[str, Any]], samples: list[Sample], settings: Sweep) -> Machine:
    """Fits a machine to the samples, and writes beside every row of ours what the rates known before predict,
    and what the fitted ones do.
    """
    machine = calibrate(samples, CostModel(settings.before, ranks_per_node=settings.ranks_per_node))
    ours = [row for row in rows if row["name"] == "ours"]
    for row, sample in zip(ours, samples, strict=True):
        for name, rates in zip(PREDICTIONS, (settings.before, machine), strict=True):
            row[name] = float(sample.case.predicted(rates).total.max(axis=1).sum()) * 1e3
    return machine
