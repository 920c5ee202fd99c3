"""Placement: which context-parallel rank holds which tokens. Every rank holds exactly as many as every other.

    documents of 5, 3 and 8 tokens on two ranks of 8

    document     rank 0: 0-5, 5-8      rank 1: 8-16
    zigzag       rank 0: 0-4, 12-16    rank 1: 4-5, 5-8, 8-12
    contiguous   rank 0: 0-5, 5-8      rank 1: 8-16

`zigzag` and `contiguous` cut the window without looking at its documents. `document` (`layout/solver.py`)
keeps a document whole on one rank where the rank's share of the attention area allows it and cuts the large
ones into shares of level area for just enough ranks, with as few rows to receive as it can; small documents
then fill every rank to its last token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.solver import split_documents, zigzag
from anchor_megatron.layout.traffic import Traffic, rows_received, traffic

__all__ = [
    "PLACEMENTS",
    "Placement",
    "balance",
    "piece_areas",
    "place",
    "place_at",
    "placement_traffic",
    "received_rows",
]

PLACEMENTS = ("document", "zigzag", "contiguous")


@dataclass(frozen=True)
class Placement:
    """Pieces in token order, int64 [P] each, of attention spans `cu_seqlens` int64 [D+1]."""

    cu_seqlens: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    document: np.ndarray
    rank: np.ndarray
    context_parallel_size: int


def place(
    kind: str,
    cu_seqlens: np.ndarray,
    *,
    context_parallel_size: int,
    window_length: int,
    costs: CostModel = CostModel(),  # noqa: B008
) -> Placement:
    """Places the tokens of attention spans `cu_seqlens` int64 [D+1] on the ranks.

    `zigzag` and `contiguous` cut each window of `window_length` tokens alike, `document` places all windows
    together, at the least seconds it finds by `costs`, split documents inside a node where they can be.
    ValueError for an unknown kind, or where the ranks do not divide the tokens they share, or the ranks of a
    node the ranks.
    """
    if kind not in PLACEMENTS:
        raise ValueError(f"placement: got {kind!r}, expected one of {', '.join(PLACEMENTS)}")
    shared = int(cu_seqlens[-1]) if kind == "document" else window_length
    if shared % context_parallel_size:
        raise ValueError(
            f"tokens: got {shared}, expected a multiple of context_parallel_size = {context_parallel_size}"
        )
    near = min(costs.ranks_per_node or context_parallel_size, context_parallel_size)
    if context_parallel_size % near:
        raise ValueError(
            f"context_parallel_size: got {context_parallel_size}, "
            f"expected a multiple of ranks_per_node = {near}"
        )
    if kind == "document":
        cuts, ranks = split_documents(cu_seqlens, context_parallel_size, costs)
    else:
        cuts, ranks = _by_window(kind, int(cu_seqlens[-1]), context_parallel_size, window_length)
    return place_at(cu_seqlens, cuts, ranks, context_parallel_size)


def piece_areas(placement: Placement) -> np.ndarray:
    """Visible (query, key) pairs int64 [P] of every piece."""
    before = placement.start - placement.cu_seqlens[placement.document]
    length = placement.stop - placement.start
    return length * before + length * (length + 1) // 2


def balance(placement: Placement) -> float:
    """The largest rank's attention area over the mean rank's."""
    areas = np.bincount(
        placement.rank, weights=piece_areas(placement), minlength=placement.context_parallel_size
    )
    return float(areas.max() / areas.mean())


def received_rows(placement: Placement) -> np.ndarray:
    """Key/value rows int64 [ranks] that each rank receives."""
    stop = placement.stop - placement.cu_seqlens[placement.document]
    tokens = placement.stop - placement.start
    return rows_received(placement.document, stop, tokens, placement.rank, placement.context_parallel_size)


def placement_traffic(placement: Placement, *, ranks_per_node: int | None = None) -> Traffic:
    """Rows that each rank receives and sends, and those that cross nodes of so many neighbouring ranks."""
    stop = placement.stop - placement.cu_seqlens[placement.document]
    tokens = placement.stop - placement.start
    node = placement.rank // (ranks_per_node or placement.context_parallel_size)
    return traffic(placement.document, stop, tokens, node, placement.rank, placement.context_parallel_size)


def _by_window(kind: str, tokens: int, ranks: int, window_length: int) -> tuple[np.ndarray, np.ndarray]:
    if kind == "zigzag":
        ends, owners = zigzag(window_length, ranks)
    else:
        ends, owners = np.arange(1, ranks + 1) * (window_length // ranks), np.arange(ranks)
    windows = tokens // window_length
    offsets = np.arange(windows)[:, None] * window_length
    return (offsets + ends[None, :]).reshape(-1), np.tile(owners, windows)


def place_at(
    cu_seqlens: np.ndarray, ends: np.ndarray, ranks: np.ndarray, context_parallel_size: int
) -> Placement:
    """The placement of pieces that end at `ends` int64 [P], on `ranks` int64 [P], cut at document borders;
    neighbours of one document on one rank are joined.
    """
    order = np.argsort(ends, kind="stable")
    ends, ranks = ends[order], ranks[order]
    cuts = np.union1d(ends, cu_seqlens[1:])
    rank = ranks[np.searchsorted(ends, cuts)]
    start = np.concatenate([[0], cuts[:-1]])
    document = np.searchsorted(cu_seqlens, start, side="right") - 1
    begins = np.ones(cuts.size, dtype=bool)
    begins[1:] = (document[1:] != document[:-1]) | (rank[1:] != rank[:-1])
    stop = cuts[np.append(np.flatnonzero(begins)[1:] - 1, cuts.size - 1)]
    return Placement(
        cu_seqlens.astype(np.int64),
        start[begins],
        stop,
        document[begins],
        rank[begins],
        context_parallel_size,
    )
