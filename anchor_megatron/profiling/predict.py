"""One layer's attention on every rank, in seconds, from a placement and a machine's rates.

    forward     local pieces, with the transfer under them | gather | waiting pieces
    backward    gather | waiting pieces | sum | local pieces, with the way home under them

What of a transfer is longer than what it can hide under (`layout/overlap.py`) is waited for; what is hidden
makes attention longer by `Machine.contention` of it. `exchange` is what the same exchange takes with nothing
above it.

Legend: n ranks of T rows, S rows sent, R received, K keys gathered for waiting pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.exchanges import Way, find_way
from anchor_megatron.layout.overlap import call_seconds, local_and_waiting, pass_seconds, waits
from anchor_megatron.layout.placement import Placement, placement_traffic
from anchor_megatron.layout.relay import wire_seconds
from anchor_megatron.layout.traffic import Traffic

__all__ = ["Prediction", "predict", "predict_way", "seconds_of_one_rank"]


@dataclass(frozen=True)
class Prediction:
    """attention, exchange  seconds float64 [2, ranks], forward and backward, of either alone
    total                of both together
    received, sent       rows of keys and values, or as many bytes, float64 [ranks], in the forward pass,
                         those handed on in a node too
    moved                what ranks need of each other; None where it does not follow documents
    two_levels           rows go to a node, or a group of ranks of one, once and are handed on there
    head_parts           parts of the heads that travel one after another, forward and backward
    """

    attention: np.ndarray
    exchange: np.ndarray
    total: np.ndarray
    received: np.ndarray
    sent: np.ndarray
    moved: Traffic | None = None
    two_levels: bool = False
    head_parts: tuple[int, int] = (1, 1)


def predict(exchange: str, placement: Placement, costs: CostModel, *, ring_rows: int) -> Prediction | None:
    """The prediction for an exchange; None where it cannot run on so many ranks.

    `direct` sends all needed rows at once, `sparse` the same or in two steps and by parts of heads where that
    is quicker, `ring` more than `ring_rows` in rounds whose outputs are merged, `ulysses` exchanges heads for
    rows.
    """
    if exchange == "ulysses":
        return _ulysses(placement, costs)
    return predict_way(
        find_way(placement, exchange=exchange, ring_rows=ring_rows, costs=costs), placement, costs
    )


def seconds_of_one_rank(lengths: np.ndarray, costs: CostModel) -> np.ndarray:
    """Seconds [2], forward and backward, of a rank that has all documents of these `lengths` to itself."""
    return np.array(
        [costs.forward_seconds(lengths, lengths).sum(), costs.backward_seconds(lengths, lengths).sum()]
    )


def predict_way(way: Way, placement: Placement, costs: CostModel) -> Prediction:
    """The prediction for rows that travel so, be it the quickest way or not.

    Rounds fly under pieces as parts of heads do. Each is merged into the result, and in the backward pass its
    rows travel once more before their gradients go home.
    """
    local, waiting = local_and_waiting(placement, costs)
    moved = placement_traffic(placement, ranks_per_node=costs.ranks_per_node)
    received, sent = moved.received, moved.sent
    if way.hops is not None:
        received, sent = (way.hops.received(received.size), way.hops.sent(received.size))
    memory = row_seconds(placement, received, sent, costs)
    calls = call_seconds(placement, costs)
    parts = way.head_parts
    if way.rounds:
        parts, calls = (way.rounds, way.rounds), np.full_like(calls, costs.machine.latency_us / 1e6)
    wire = np.stack([wire_seconds(moved, way.hops, costs, head_parts=one) for one in parts])
    if way.rounds:
        wire[1] *= 2
        memory[1] += 2 * sent * costs.shape.row_bytes / costs.machine.memory_gb_per_s / 1e9
        memory += _merging_seconds(placement, costs, way.rounds)
    together = np.stack(
        [pass_seconds(local[i], waiting[i], wire[i], costs, parts=parts[i], call=calls[i]) for i in range(2)]
    )
    return Prediction(
        local + waiting, wire + memory, together + memory, received, sent, moved, way.hops is not None,
        way.head_parts,
    )  # fmt: skip


def _merging_seconds(placement: Placement, costs: CostModel, rounds: int) -> np.ndarray:
    """Seconds [ranks] in which each round's outputs are merged into the result in fp32."""
    queries, _ = _queries_and_keys(placement)
    values = costs.shape.heads * costs.shape.head_dim * 8 * rounds
    merged = _by_rank(placement, np.where(waits(placement), queries, 0)) * values
    return merged / costs.machine.merge_gb_per_s / 1e9


def row_seconds(placement: Placement, received: np.ndarray, sent: np.ndarray, costs: CostModel) -> np.ndarray:
    """Seconds [2, ranks] in which rows, so many of them `received` and `sent` [ranks], are read and written
    besides travelling: packed and gathered; then gathered again, their gradients summed for the way home and
    added to the rank's own.
    """
    queries, keys = _queries_and_keys(placement)
    rows, gathered = (_by_rank(placement, one) for one in (queries, np.where(waits(placement), keys, 0)))
    forward = 2 * sent + 2 * gathered
    home = np.where(sent + gathered > 0, gathered + sent + 2 * rows, 0)
    backward = 3 * gathered + received + home
    return np.stack([forward, backward]) * costs.shape.row_bytes / costs.machine.memory_gb_per_s / 1e9


def _queries_and_keys(placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Rows of every piece, and the keys that its last row sees."""
    return placement.stop - placement.start, placement.stop - placement.cu_seqlens[placement.document]


def _by_rank(placement: Placement, values: np.ndarray) -> np.ndarray:
    return np.bincount(placement.rank, weights=values, minlength=placement.context_parallel_size)


def _ulysses(placement: Placement, costs: CostModel) -> Prediction | None:
    """All-to-all over heads: every rank attends to the whole window with its share of the query heads."""
    ranks, shape = placement.context_parallel_size, costs.shape
    if shape.heads % ranks:
        return None
    lengths = np.diff(placement.cu_seqlens)
    attention = np.repeat(seconds_of_one_rank(lengths, costs)[:, None] / ranks, ranks, axis=1)
    rows = int(placement.cu_seqlens[-1]) / ranks
    # values a row that go to each other rank: queries there and outputs back, keys and values
    groups = shape.heads / ranks / math.gcd(shape.heads // ranks, shape.heads // shape.groups)
    values = shape.head_dim * (2 * shape.heads / ranks + 2 * groups)
    received = rows * (ranks - 1) * values * shape.bytes_per_value / shape.row_bytes
    near = min(costs.ranks_per_node or ranks, ranks)
    crossing = received * (ranks - near) / max(1, ranks - 1)
    latency = 2 * costs.machine.latency_us / 1e6 * (ranks > 1)
    rearranged = received * shape.row_bytes / costs.machine.heads_gb_per_s / 1e9
    wire = latency + max(rearranged, float(costs.transfer_seconds(received, crossing)))
    exchange = np.full((2, ranks), wire)
    each = np.ones(ranks)
    return Prediction(attention, exchange, attention + exchange, received * each, received * each)
