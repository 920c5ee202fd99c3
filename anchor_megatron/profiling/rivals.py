"""How others place documents, at the same rates as ours: what their layouts cost, not their kernels.

Every document over all ranks (TransformerEngine's packed sequences under context parallelism, p2p;
https://github.com/NVIDIA/TransformerEngine, `thd_get_partitioned_indices`): a document is padded to a
multiple of 2 n, cut into 2 n chunks, and rank r has chunks r and 2 n - 1 - r. Keys go around the whole ring:

    12 tokens on 2 ranks    0-3 and 9-12 | 3-9      level, every key travels, and pieces are short

Shuffled chunks (MagiAttention's dispatch, https://github.com/SandAI-org/MagiAttention): the window is cut
into chunks of one size, which are dealt out so that areas are level and every rank has equally many; then
only needed keys travel. Here: the chunk with most area first, to the rank with least that has room.
"""

from __future__ import annotations

import heapq

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.placement import Placement, place_at
from anchor_megatron.profiling.predict import Prediction

__all__ = ["CHUNK_SIZES", "place_chunks", "predict_every_document_everywhere"]

CHUNK_SIZES = (512, 1024, 2048)


def place_chunks(cu_seqlens: np.ndarray, ranks: int, chunk: int) -> Placement:
    """Places chunks of `chunk` tokens, which must divide a rank's share, as told above."""
    count = int(cu_seqlens[-1]) // chunk
    assert count % ranks == 0, f"{count} chunks of {chunk} tokens do not divide among {ranks} ranks"
    ends = np.arange(1, count + 1, dtype=np.int64) * chunk
    areas = np.diff(_area_before(cu_seqlens, np.append(0, ends)))
    owner = np.empty(count, dtype=np.int64)
    least = [(0, rank, count // ranks) for rank in range(ranks)]  # area, rank, chunks to come
    for index in np.argsort(-areas, kind="stable").tolist():
        area, rank, left = heapq.heappop(least)
        owner[index] = rank
        if left > 1:
            heapq.heappush(least, (area + int(areas[index]), rank, left - 1))
    return place_at(cu_seqlens, ends, owner, ranks)


def _area_before(cu_seqlens: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Visible pairs int64 of all tokens before each `token`."""
    lengths = np.diff(cu_seqlens)
    whole = np.concatenate([[0], np.cumsum(lengths * (lengths + 1) // 2)])
    document = np.searchsorted(cu_seqlens, token, side="right") - 1
    inside = token - cu_seqlens[document]
    return whole[document] + inside * (inside + 1) // 2


def predict_every_document_everywhere(lengths: np.ndarray, ranks: int, costs: CostModel) -> Prediction:
    """The prediction for every document over all ranks; keys go around in n - 1 steps.

    In the first step a rank attends to its own two chunks of every document, in the others with both to the
    first chunk of a rank before it, or with its last chunk to both of a rank behind it. Each step's output
    is merged in fp32, each step's transfer lies under the step before.
    """
    unit = 2 * ranks
    chunk = -(-lengths // unit)
    rows = int(2 * chunk.sum())
    own = _seconds(2 * chunk, 2 * chunk, costs, causal=True)
    before = _seconds(2 * chunk, chunk, costs, causal=False)
    behind = _seconds(chunk, 2 * chunk, costs, causal=False)
    near = costs.ranks_per_node is None or costs.ranks_per_node >= ranks
    ring = float(costs.transfer_seconds(rows, 0 if near else rows)) + costs.machine.latency_us / 1e6
    wire = ring * np.array([1, 2])  # backward, keys and their gradients go around
    merge = rows * costs.shape.heads * costs.shape.head_dim * 10 / costs.machine.memory_gb_per_s / 1e9
    # ranks wait for their neighbours in every step, so each takes as long as its longer kind
    later = np.maximum(before, behind)
    attention = own + (ranks - 1) * later
    over = np.maximum(wire - np.minimum(own, later), 0) + (ranks - 2) * np.maximum(wire - later, 0)
    unhidden = over * (ranks > 1)
    hidden = wire * (ranks - 1) - unhidden
    total = attention + unhidden + costs.machine.contention * hidden + merge * (ranks - 1)
    each = np.ones(ranks)
    received = (ranks - 1.0) * rows * each
    return Prediction(
        attention[:, None] * each,
        (wire * (ranks - 1))[:, None] * each,
        total[:, None] * each,
        received,
        received,
    )


def _seconds(queries: np.ndarray, keys: np.ndarray, costs: CostModel, *, causal: bool) -> np.ndarray:
    """Seconds [2] of pieces, forward and backward."""
    directions = (costs.forward_seconds, costs.backward_seconds)
    return np.array([seconds(queries, keys, causal=causal).sum() for seconds in directions])
