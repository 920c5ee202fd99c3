"""A machine's rates from measured samples: least squares on relative errors, nothing below zero.

    attention   milliseconds = a (pairs + b rows), forward and backward: TFLOP/s and pairs a row
    exchange    milliseconds = latency + rows on their way / bandwidth + rows moved / memory bandwidth
    total       what is left of it is `contention` times the hidden part of the transfer; of `ring` the
                merging of rounds, of `ulysses` the rearranging of heads

Bandwidth between nodes is not fitted but taken as it was: one node does not show it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from anchor_megatron.layout.cost import CostModel, Machine, tiled
from anchor_megatron.layout.exchanges import Way
from anchor_megatron.layout.placement import Placement, placement_traffic
from anchor_megatron.profiling.measure import Sample
from anchor_megatron.profiling.predict import row_seconds

__all__ = ["calibrate", "least_squares"]


def calibrate(samples: list[Sample], before: CostModel) -> Machine:
    """`before.machine` with the rates that fit the samples best, first those in which rows travel in one
    step and all heads at once, then `ring` in rounds and `ulysses`; rates that they do not show (no exchange
    on one rank) stay. Exchanges are looked at inside a node.
    """
    rows = [(one, one.case.way) for one in samples if one.case.exchange != "ulysses"]
    plain = [one for one, way in rows if way == Way()]
    machine = _fit_attention(plain, before.machine)
    most = before.ranks_per_node or max(sample.case.ranks for sample in samples)

    def shared(own: list[Sample]) -> list[Sample]:
        return [one for one in own if 1 < one.case.ranks <= most]

    if any(_receives(sample) for sample in shared(plain)):
        machine = _fit_exchange(shared(plain), machine)
        machine = _fit_contention(shared(plain), machine)
    if own := shared([one for one, way in rows if way.rounds]):
        machine = _fit_rate(own, machine, "merge_gb_per_s")
    if own := shared([one for one in samples if one.case.exchange == "ulysses"]):
        machine = _fit_rate(own, machine, "heads_gb_per_s")
    return machine


def _receives(sample: Sample) -> bool:
    return bool(placement_traffic(sample.case.placement).received.any())


def least_squares(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients, none below 0, of `columns` [rows, C] that come closest to `values` [rows], each row's
    error as a part of its value: of all choices of columns the best without a negative one.
    """
    scaled = columns / values[:, None]
    best, least = np.zeros(columns.shape[1]), np.inf
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), count)):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(values.size), rcond=None)[0]
            error = float(((scaled[:, chosen] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = found
    return best


def _fit_attention(samples: list[Sample], machine: Machine) -> Machine:
    found: dict[str, Any] = {}
    for direction, name, flops in ((0, "forward", 4), (1, "backward", 10)):
        columns, values = [], []
        for sample in samples:
            unit = flops * sample.case.shape.heads * sample.case.shape.head_dim / 1e12
            pairs, rows = _work(sample.case.placement, machine.tile)
            columns.append(np.stack([pairs * unit, rows * unit], axis=1))
            values.append(sample.attention[direction] / 1e3)
        pair, row = least_squares(np.concatenate(columns), np.concatenate(values)).tolist()
        if pair > 0:
            found |= {f"{name}_tflops": 1 / pair, f"{name}_row_pairs": row / pair}
    return replace(machine, **found)


def _work(placement: Placement, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs and rows of every rank, in tiles."""
    first = placement.cu_seqlens[placement.document]
    pieces = tiled(placement.stop - placement.start, placement.stop - first, tile, causal=True)
    ranks = placement.context_parallel_size
    pairs, rows = (np.bincount(placement.rank, weights=one, minlength=ranks) for one in pieces)
    return pairs, rows


def _fit_exchange(samples: list[Sample], machine: Machine) -> Machine:
    columns, values = [], []
    for sample in samples:
        costs = CostModel(machine, sample.case.shape)
        moved = placement_traffic(sample.case.placement)
        wire = np.maximum(moved.received, moved.sent) * costs.shape.row_bytes / 1e9
        unit = CostModel(replace(machine, memory_gb_per_s=1.0), sample.case.shape)
        memory = row_seconds(sample.case.placement, moved.received, moved.sent, unit)
        for direction in (0, 1):
            columns.append(np.stack([np.ones(wire.size), wire, memory[direction]], axis=1))
            values.append(sample.exchange[direction] / 1e3)
    latency, byte, moved_byte = least_squares(np.concatenate(columns), np.concatenate(values)).tolist()
    found: dict[str, Any] = {"latency_us": latency * 1e6}
    found |= {"inside_gb_per_s": 1 / byte} if byte else {}
    found |= {"memory_gb_per_s": 1 / moved_byte} if moved_byte else {}
    return replace(machine, **found)


def _fit_contention(samples: list[Sample], machine: Machine) -> Machine:
    """The contention at which totals come closest: Gauss-Newton, in steps as the slowest rank changes."""
    measured = _measured(samples)
    contention = 0.5
    for _ in range(5):
        now = _totals(samples, replace(machine, contention=contention))
        slope = (_totals(samples, replace(machine, contention=contention + 1e-3)) - now) / 1e-3 / measured
        step = float(np.dot(1 - now / measured, slope) / max(float(np.dot(slope, slope)), 1e-30))
        contention = min(1.0, max(0.0, contention + step))
    return replace(machine, contention=contention)


def _fit_rate(samples: list[Sample], machine: Machine, name: str) -> Machine:
    """The rate `name` at which totals come closest, of rates 2 % apart."""
    measured = _measured(samples)

    def error(changed: Machine) -> float:
        return float(((_totals(samples, changed) / measured - 1) ** 2).sum())

    rates: list[dict[str, Any]] = [{name: rate} for rate in np.geomspace(1, 10_000, 466).tolist()]
    return min((replace(machine, **rate) for rate in rates), key=error)


def _measured(samples: list[Sample]) -> np.ndarray:
    """Seconds of the slowest rank, forward and backward, of one sample after another."""
    return np.concatenate([sample.total.max(axis=1) / 1e3 for sample in samples])


def _totals(samples: list[Sample], machine: Machine) -> np.ndarray:
    """As `_measured`, predicted."""
    return np.concatenate([sample.case.predicted(machine).total.max(axis=1) for sample in samples])
