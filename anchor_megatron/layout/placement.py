"""Placement: which context-parallel rank holds which tokens. Every rank holds exactly as many as every other.

    documents of 5, 3 and 8 tokens on two ranks of 8

    document     rank 0: 0-5, 5-8      rank 1: 8-16
    zigzag       rank 0: 0-4, 12-16    rank 1: 4-5, 5-8, 8-12
    contiguous   rank 0: 0-5, 5-8      rank 1: 8-16

`zigzag` and `contiguous` cut the window without looking at its documents. `document` keeps a document whole
on one rank where the rank's share of the attention area allows it and splits the large ones, zigzag, over
just enough ranks; small documents then fill every rank to its last token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["PLACEMENTS", "Placement", "balance", "piece_areas", "place"]

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


def place(kind: str, cu_seqlens: np.ndarray, *, context_parallel_size: int, window_length: int) -> Placement:
    """Places the tokens of attention spans `cu_seqlens` int64 [D+1] on the ranks.

    `zigzag` and `contiguous` cut each window of `window_length` tokens alike, `document` places all windows
    together. ValueError for an unknown kind, or where the ranks do not divide the tokens they share.
    """
    if kind not in PLACEMENTS:
        raise ValueError(f"placement: got {kind!r}, expected one of {', '.join(PLACEMENTS)}")
    shared = int(cu_seqlens[-1]) if kind == "document" else window_length
    if shared % context_parallel_size:
        raise ValueError(
            f"tokens: got {shared}, expected a multiple of context_parallel_size = {context_parallel_size}"
        )
    if kind == "document":
        cuts, ranks = _by_document(cu_seqlens, context_parallel_size)
    else:
        cuts, ranks = _by_window(kind, int(cu_seqlens[-1]), context_parallel_size, window_length)
    return _placement(cu_seqlens, cuts, ranks, context_parallel_size)


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


def _zigzag(tokens: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 2 * ranks chunks of `tokens` and the rank of each; a chunk and its mirror image make equal
    shares.
    """
    shares = np.diff(np.arange(ranks + 1) * tokens // ranks)
    first = shares // 2
    lengths = np.concatenate([first, (shares - first)[::-1]])
    owners = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    return np.cumsum(lengths)[lengths > 0], owners[lengths > 0]


def _by_window(kind: str, tokens: int, ranks: int, window_length: int) -> tuple[np.ndarray, np.ndarray]:
    if kind == "zigzag":
        ends, owners = _zigzag(window_length, ranks)
    else:
        ends, owners = np.arange(1, ranks + 1) * (window_length // ranks), np.arange(ranks)
    windows = tokens // window_length
    offsets = np.arange(windows)[:, None] * window_length
    return (offsets + ends[None, :]).reshape(-1), np.tile(owners, windows)


def _by_document(cu_seqlens: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of pieces and their ranks: largest documents first, each on the ranks with least area so far."""
    lengths = np.diff(cu_seqlens)
    areas = lengths * (lengths + 1) / 2
    room = np.full(ranks, int(cu_seqlens[-1]) // ranks)
    load = np.zeros(ranks)
    fair = areas.sum() / ranks
    ends: list[int] = []
    owners: list[int] = []
    for document in np.argsort(-lengths, kind="stable"):
        start, length = int(cu_seqlens[document]), int(lengths[document])
        wanted = min(ranks, max(1, int(np.ceil(areas[document] / fair * 0.98))))
        candidates = np.argsort(load, kind="stable")
        share = -(-length // wanted)
        chosen = [int(rank) for rank in candidates if room[rank] >= share][:wanted]
        if len(chosen) == wanted:
            cut, who = (np.array([length]), np.array([0])) if wanted == 1 else _zigzag(length, wanted)
            who = np.asarray(chosen)[who]
        else:
            cut, who = _fill(length, room, candidates)
        begin = 0
        for stop, rank in zip(cut.tolist(), who.tolist(), strict=True):
            ends.append(start + stop)
            owners.append(rank)
            room[rank] -= stop - begin
            load[rank] += (stop - begin) * (stop + begin + 1) / 2
            begin = stop
    return np.asarray(ends), np.asarray(owners)


def _fill(length: int, room: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a document that fits nowhere into pieces that fill the ranks with most room left."""
    cut, who, done = [], [], 0
    for rank in sorted(candidates.tolist(), key=lambda rank: -room[rank]):
        take = min(int(room[rank]), length - done)
        if take:
            done += take
            cut.append(done)
            who.append(rank)
    assert done == length, f"documents of {length - done} more tokens than the ranks have room for"
    return np.asarray(cut), np.asarray(who)


def _placement(
    cu_seqlens: np.ndarray, ends: np.ndarray, ranks: np.ndarray, context_parallel_size: int
) -> Placement:
    """Sorts pieces, cuts them at document borders, joins neighbours of one document on one rank."""
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
