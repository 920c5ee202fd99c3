"""The exchange over heads: every rank attends to whole documents, for its share of the query heads.

Two ranks, five tokens of which rank 0 holds 0 1 4 and rank 1 holds 2 3 5, four query heads: after the
exchange each has two heads of all rows, the other rank's first, its own behind them. `to_tokens` brings them
into the window's order, where documents are whole, `to_rows` back:

                rank 0           rank 1
    to_rows     2 3 5 0 1 4      0 1 4 2 3 5      row i is token to_rows[i]
    to_tokens   3 4 0 1 5 2      0 1 3 4 2 5      token t is row to_tokens[t]
"""

from __future__ import annotations

import numpy as np

from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.plan import Whole, make_plans

__all__ = ["make_whole"]


def make_whole(placement: Placement, rank: int) -> Whole:
    """What `rank` needs for an exchange over heads."""
    plans = make_plans(placement)
    plans.append(plans.pop(rank))
    rows = np.concatenate([plan.token_index for plan in plans])
    return Whole(placement.cu_seqlens.astype(np.int32), np.argsort(rows), rows)
