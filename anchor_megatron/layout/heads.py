"""The exchange over heads: every rank attends to whole documents, for its share of the query heads.

Two ranks, five tokens of which rank 0 holds 0 1 4 and rank 1 holds 2 3 5, four query heads: after the
exchange rank 0 has heads 0-1 of the rows 0 1 4 2 3 5, rank 1 heads 2-3 of the same rows. `to_tokens` brings
them into the window's order, where documents are whole, `to_rows` back:

    to_tokens   0 1 3 4 2 5      token t is row to_tokens[t]
    to_rows     0 1 4 2 3 5      row i is token to_rows[i]
"""

from __future__ import annotations

import numpy as np

from anchor_megatron.layout.placement import Placement
from anchor_megatron.layout.plan import Whole, make_plans

__all__ = ["make_whole"]


def make_whole(placement: Placement) -> Whole:
    """What an exchange over heads needs of a placement."""
    rows = np.concatenate([plan.token_index for plan in make_plans(placement)])
    return Whole(placement.cu_seqlens.astype(np.int32), np.argsort(rows), rows)
