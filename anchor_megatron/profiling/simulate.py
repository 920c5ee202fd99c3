"""The table of what context parallelism would do on up to a thousand ranks, from the cost model alone.

For every number of ranks some windows are drawn, placed in every way and predicted for every exchange, and
so are the layouts of others (`rivals.py`). A row is the mean over the windows, `worst` their worst.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.layout.bounds import least_received_rows, least_unevenness
from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.exchanges import EXCHANGES, plan_exchange
from anchor_megatron.layout.placement import PLACEMENTS, Placement, balance, place
from anchor_megatron.profiling.predict import Prediction, predict, seconds_of_one_rank
from anchor_megatron.profiling.rivals import CHUNK_SIZES, place_chunks, predict_every_document_everywhere
from anchor_megatron.profiling.windows import draw_window

__all__ = ["RANKS", "TARGETS", "Settings", "simulate"]

RANKS = (2, 4, 8, 16, 32, 64, 256, 1024)
# ranks: balance of the mean and of the worst window, worst rank's received rows of a full ring's, planning ms
TARGETS: dict[int, tuple[float, float | None, float, float | None]] = {
    2: (1.01, 1.03, 0.08, None),
    4: (1.01, 1.03, 0.20, None),
    8: (1.02, 1.05, 0.15, 5),
    16: (1.02, 1.05, 0.18, None),
    32: (1.02, 1.05, 0.17, None),
    64: (1.02, 1.05, 0.15, 60),
    256: (1.03, None, 0.045, None),
    1024: (1.03, None, 0.02, 2000),
}


@dataclass(frozen=True)
class Settings:
    """What to simulate; documents are cut at `1 / parts` of a window, a round of `ring` brings at most
    `ring_rows` rows.
    """

    lengths: Path
    costs: CostModel
    ring_rows: int
    tokens_per_rank: int = 16384
    windows: int = 20
    parts: int = 4


def simulate(settings: Settings, ranks: int) -> list[dict[str, Any]]:
    """The rows of this number of ranks, means over the windows: ours, then others'."""
    windows = [_window(settings, ranks, seed) for seed in range(settings.windows)]
    rows = []
    for index, (key, _) in enumerate(windows[0]):
        found = [window[index][1] for window in windows]
        if all(found):
            rows.append({"ranks": ranks, **key, **_summary([one for one in found if one])})
    return rows


Row = tuple[dict[str, str], dict[str, float] | None]  # who it is, and figures of one window


def _window(settings: Settings, ranks: int, seed: int) -> list[Row]:
    tokens = settings.tokens_per_rank * ranks
    cu_seqlens = draw_window(settings.lengths, tokens=tokens, longest=tokens // settings.parts, seed=seed)
    return list(_cases(settings, cu_seqlens, ranks))


def _cases(settings: Settings, cu_seqlens: np.ndarray, ranks: int) -> Iterator[Row]:
    """Every placement and exchange, and what others do, for one window."""
    costs, lengths = settings.costs, np.diff(cu_seqlens)
    one_rank = float(seconds_of_one_rank(lengths, costs).sum())

    def figures(prediction: Prediction | None, placement: Placement | None) -> dict[str, float] | None:
        if prediction is None:
            return None
        return _figures(prediction, placement, one_rank, settings.tokens_per_rank, costs)

    for kind in PLACEMENTS:
        started = time.process_time()
        placement = _placed(kind, cu_seqlens, ranks, costs)
        if kind == "document":  # any rank's plan is as quick as another's
            plan_exchange(placement, ranks - 1, exchange="sparse", ring_rows=settings.ring_rows, costs=costs)
        milliseconds = (time.process_time() - started) * 1e3
        for exchange in EXCHANGES if kind == "document" else EXCHANGES[:1]:
            level = exchange == "ulysses"  # heads are divided, whatever the placement
            prediction = predict(exchange, placement, costs, ring_rows=settings.ring_rows)
            found = figures(prediction, None if level else placement)
            if found and (kind, exchange) == ("document", "sparse"):
                found |= {"plan_ms": milliseconds} | _bounds(placement, settings.tokens_per_rank)
            yield {"name": "ours", "placement": kind, "exchange": exchange}, found
    everywhere = figures(predict_every_document_everywhere(lengths, ranks, costs), None)
    yield {"name": "TransformerEngine THD", "placement": "every document", "exchange": "p2p"}, everywhere
    yield (
        {"name": "shuffled chunks", "placement": "chunks", "exchange": "sparse"},
        _best_chunks(figures, cu_seqlens, ranks, settings),
    )


def _placed(kind: str, cu_seqlens: np.ndarray, ranks: int, costs: CostModel) -> Placement:
    tokens = int(cu_seqlens[-1])
    return place(kind, cu_seqlens, context_parallel_size=ranks, window_length=tokens, costs=costs)


def _best_chunks(
    figures: Callable[..., dict[str, float] | None],
    cu_seqlens: np.ndarray,
    ranks: int,
    settings: Settings,
) -> dict[str, float] | None:
    """The size of chunks at which the window is fastest."""
    found = []
    for chunk in CHUNK_SIZES:
        if settings.tokens_per_rank % chunk == 0:
            placement = place_chunks(cu_seqlens, ranks, chunk)
            prediction = predict("sparse", placement, settings.costs, ring_rows=settings.ring_rows)
            found.append(figures(prediction, placement))
    return min((one for one in found if one), key=lambda one: one["total_ms"], default=None)


def _figures(
    prediction: Prediction,
    placement: Placement | None,
    one_rank: float,
    tokens_per_rank: int,
    costs: CostModel,
) -> dict[str, float]:
    ranks = prediction.received.size
    ring = max(1, tokens_per_rank * (ranks - 1))
    forward, backward = prediction.total.max(axis=1).tolist()
    attention, exchange = (float(x.max(axis=1).sum()) for x in (prediction.attention, prediction.exchange))
    found = {
        "balance": 1.0 if placement is None else balance(placement),
        "received": float(prediction.received.max()) / ring,
        "sent": float(prediction.sent.max()) / ring,
        "attention_ms": attention * 1e3,
        "exchange_ms": exchange * 1e3,
        "not_hidden_ms": (forward + backward - attention) * 1e3,
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "total_ms": (forward + backward) * 1e3,
        "efficiency": one_rank / ranks / (forward + backward),
    }
    if (moved := prediction.moved) is not None:
        found |= {
            "needed": float(moved.received.max()) / ring,  # without what is merely handed on
            "two_levels": float(prediction.two_levels),
            "head_parts": float(np.mean(prediction.head_parts)),
        }
        if costs.ranks_per_node is not None:
            megabytes = costs.shape.row_bytes / 1e6 / ranks
            found["across_one_level_mb"] = float(moved.crossing.sum()) * megabytes
            found["across_two_levels_mb"] = float(moved.node_crossing.sum()) * megabytes
    return found


def _bounds(placement: Placement, tokens_per_rank: int) -> dict[str, float]:
    """What no placement can beat, at the balance that is the target."""
    ranks, cu_seqlens = placement.context_parallel_size, placement.cu_seqlens
    ring = max(1, tokens_per_rank * (ranks - 1))
    unevenness = TARGETS.get(ranks, (1.02,))[0]
    rows = least_received_rows(cu_seqlens, ranks, unevenness=unevenness)
    return {
        "least_balance": least_unevenness(cu_seqlens, ranks),
        "least_received": rows / ring,
    }


def _summary(found: list[dict[str, float]]) -> dict[str, float]:
    """Means, and the worst of what has targets."""
    mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    worst = [name for name in ("balance", "received", "needed") if name in mean]
    return mean | {f"worst_{name}": max(one[name] for one in found) for name in worst}
