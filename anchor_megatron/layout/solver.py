"""Where documents go: equal tokens on every rank exactly, area level, few rows to receive, few pieces.

`layout/attempt.py` places documents at one setting; here several are tried and the best is kept, by the
seconds of its slowest rank (`layout/cost.py`). A try that is level and receives little more than it must
is not improved upon. A window of a few long documents and nothing short to fill with may come out uneven;
then ways that cut more are tried too, and area goes before rows. Deterministic.

    documents of 12, 8, 6, 4 and 2 tokens on 2 ranks
    rank 0    3-8 of the first, the second, 1-4 of the fourth                       75 pairs, 4 rows received
    rank 1    0-3 and 8-12 of the first, the third, 0-1 of the fourth, the fifth    73 pairs, 5 rows received
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from anchor_megatron.layout.attempt import Attempt, Settings, zigzag
from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.traffic import rows_received

__all__ = ["split_documents", "zigzag"]

_TRIED = (
    Settings(slack=0.015, small=0.03),
    Settings(slack=0.02, small=0.04, pack=True),
    Settings(slack=0.003, small=0.02),
)
# with few ranks a little area less level can be many rows less
_LOOSE = (Settings(slack=0.03, small=0.03), Settings(slack=0.045, small=0.04, pack=True))
_LAST_RESORTS = (
    Settings(slack=0.015, small=0.03, filling=0.2),
    Settings(slack=0.015, small=0.03, filling=0.4),
    Settings(slack=0.015, small=0.03, spread=True),
)
_LEVEL = 1.02  # attention time over the mean below which rows alone decide; kernels differ by as much
# a try this level, whose worst rank receives this much of the least it must, is kept without another
_VERY_LEVEL, _GOOD = 1.01, 1.2
_FEW = 4  # so few ranks are placed so quickly that more tries cost nothing
_UNEVEN = 1.03  # largest area over the mean above which last resorts are tried


def split_documents(cu_seqlens: np.ndarray, ranks: int, costs: CostModel) -> tuple[np.ndarray, np.ndarray]:
    """Ends int64 [P] of pieces and the rank int64 [P] of each, for documents `cu_seqlens` int64 [D+1].

    Every rank gets cu_seqlens[-1] / ranks tokens.
    """
    if cu_seqlens.size == 2 or ranks == 1:
        return zigzag(int(cu_seqlens[-1]), ranks)
    lengths = np.diff(cu_seqlens)
    tries = _tries(lengths, ranks, costs)
    if min(one.unevenness for one in tries) > _UNEVEN and costs.ranks_per_node is not None:
        tries += _tries(lengths, ranks, replace(costs, ranks_per_node=None))
    if min(one.unevenness for one in tries) > _UNEVEN:
        tries += [_Try(lengths, ranks, settings, costs) for settings in _LAST_RESORTS]
    best = min(tries, key=lambda one: (max(one.unevenness, _UNEVEN), one.seconds))
    document, _, stop, rank = best.pieces
    return cu_seqlens[document] + stop, rank


def _tries(lengths: np.ndarray, ranks: int, costs: CostModel) -> list[_Try]:
    """Tries until one is good; all, and looser ones, on few ranks."""
    tries = [_Try(lengths, ranks, _TRIED[0], costs)]
    for settings in _TRIED[1:]:
        if ranks <= _FEW or not any(one.is_good for one in tries):
            tries.append(_Try(lengths, ranks, settings, costs))
    if ranks <= _FEW:
        tries += [_Try(lengths, ranks, settings, costs) for settings in _LOOSE]
    return tries


class _Try:
    """The pieces int64 [4, P] (document, start, stop, rank) of one setting, and what they cost."""

    def __init__(self, lengths: np.ndarray, ranks: int, settings: Settings, costs: CostModel) -> None:
        attempt = Attempt(lengths, ranks, settings, costs.ranks_per_node)
        document, start, stop, rank = self.pieces = attempt.run()
        areas = np.bincount(rank, weights=(stop - start) * (stop + start + 1), minlength=ranks)
        self.unevenness = float(areas.max() / areas.mean())
        attention = costs.attention_seconds(stop - start, stop, rank, ranks)
        longest, mean = float(attention.max()), float(attention.mean())
        received = int(rows_received(document, stop, stop - start, rank, ranks).max())
        self.seconds = max(longest, _LEVEL * mean) + costs.added_seconds(received)
        self.is_good = longest <= _VERY_LEVEL * mean and received <= _GOOD * attempt.bound
