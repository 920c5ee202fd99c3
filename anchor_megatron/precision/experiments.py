"""The measurements. Each takes vectors and implementations and gives rows: dictionaries of plain numbers.

    shift_test     the same tokens with all positions moved by d: exact arithmetic changes nothing
    length_test    the same, by the length of the sequence, for its last queries
    logit_test     the first token's score by the distance of the query, against FP64
    mode_test      one document far into a window, in each mode: against FP64, and against its place in front

Source: arXiv 2411.13476, sections 2 and 3.

Legend: T tokens, N query heads, G key/value heads, R query rows, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchor_megatron.layout.modes import positions as mode_positions
from anchor_megatron.precision.attention import Vectors, compare, spread_rows, weights_of
from anchor_megatron.precision.rope import EXACT, Rope

__all__ = ["Row", "key_profile", "length_test", "logit_test", "mode_test", "octaves", "shift_test"]

Row = dict[str, Any]
_MODES = ("document_reset", "document", "anchor")


def shift_test(
    vectors: Vectors,
    ropes: Sequence[Rope],
    *,
    reference: int,
    shifts: Sequence[int],
    rows: int = 64,
    arithmetic: str = "fused",
) -> list[Row]:
    """D between positions moved by `reference` and by each of `shifts`, of `rows` queries spread over the
    sequence.

    profile: D by key in octaves: [0], [1], [2, 4), [4, 8), ...
    """
    places = torch.arange(vectors.k_TGH.shape[0], device=vectors.k_TGH.device)
    chosen = spread_rows(places.numel(), rows, places.device)
    found = []
    for rope in ropes:
        base = weights_of(vectors, rope, places + reference, chosen, arithmetic=arithmetic)
        for shift in shifts:
            moved = weights_of(vectors, rope, places + shift, chosen, arithmetic=arithmetic)
            difference = compare(base, moved)
            found.append(
                dict(
                    vectors=vectors.name,
                    rope=rope.name,
                    arithmetic=arithmetic,
                    reference=reference,
                    shift=shift,
                    length=places.numel(),
                    difference=difference.total,
                    first_share=difference.first_share,
                    first_attention=float(base[:, :, 0].mean(dtype=torch.float64)),
                    profile=key_profile(difference.per_key),
                )
            )
    return found


def octaves(length: int) -> list[int]:
    """Borders of the keys' bins [0], [1], [2, 4), [4, 8), ... up to `length`."""
    borders = [0, 1, 2]
    while borders[-1] < length:
        borders.append(min(2 * borders[-1], length))
    return borders


def key_profile(per_key: Tensor) -> list[float]:
    """Sums over the bins of `octaves`."""
    borders = octaves(per_key.numel())
    return [float(per_key[a:b].sum()) for a, b in zip(borders, borders[1:], strict=False)]


def length_test(
    vectors: Vectors, ropes: Sequence[Rope], *, reference: int, shift: int, lengths: Sequence[int], rows: int
) -> list[Row]:
    """`shift_test` of the first `lengths` tokens; only the last `rows` queries of each are looked at.

    Also the departure of the weights from FP64 at the same (reference) positions.
    """
    found = []
    for length in lengths:
        places = torch.arange(length, device=vectors.k_TGH.device)
        part = Vectors(
            vectors.name, vectors.q_TNH[:length], vectors.k_TGH[:length], vectors.frequencies, vectors.scale
        )
        chosen = places[-rows:]
        exact = weights_of(part, EXACT, places + reference, chosen)
        for rope in ropes:
            base = weights_of(part, rope, places + reference, chosen)
            moved = compare(base, weights_of(part, rope, places + shift, chosen))
            error = compare(base, exact)
            found.append(
                dict(
                    vectors=vectors.name,
                    rope=rope.name,
                    length=length,
                    reference=reference,
                    shift=shift,
                    difference=moved.total,
                    first_share=moved.first_share,
                    error=error.total,
                    error_first_share=error.first_share,
                    first_attention=float(exact[:, :, 0].mean()),
                )
            )
    return found


def logit_test(
    vectors: Vectors, ropes: Sequence[Rope], *, distances: Sequence[int], shift: int, rows: int = 64
) -> list[Row]:
    """The score of the first key, at position 0, for the same query vectors placed at each distance from it.

    error: root mean square of score - FP64's over queries and heads. moved: that of the score's change when
    both positions move by `shift`, which exact arithmetic leaves alone. logit: root mean square of the score.
    """
    chosen = spread_rows(vectors.q_TNH.shape[0], rows, vectors.q_TNH.device)
    q_RNH = vectors.q_TNH[chosen]
    found = []
    for distance in distances:
        exact = _first_logits(vectors, EXACT, q_RNH, distance, 0)
        for rope in ropes:
            here = _first_logits(vectors, rope, q_RNH, distance, 0)
            there = _first_logits(vectors, rope, q_RNH, distance, shift)
            found.append(
                dict(
                    vectors=vectors.name,
                    rope=rope.name,
                    distance=distance,
                    shift=shift,
                    logit=_rms(exact),
                    error=_rms(here - exact),
                    moved=_rms(there - here),
                )
            )
    return found


def _first_logits(vectors: Vectors, rope: Rope, q_RNH: Tensor, distance: int, shift: int) -> Tensor:
    """Scores fp64 [R, N] of queries at `distance + shift` with the first key at `shift`."""
    at = torch.full((q_RNH.shape[0],), distance + shift, device=q_RNH.device)
    turned = rope(q_RNH, at, vectors.frequencies).double()
    key = rope(vectors.k_TGH[:1], at.new_tensor([shift]), vectors.frequencies).double()
    key_NH = key[0].repeat_interleave(q_RNH.shape[1] // vectors.k_TGH.shape[1], dim=0)
    return (turned * key_NH).sum(dim=-1) * vectors.scale


def mode_test(
    vectors: Vectors, ropes: Sequence[Rope], *, offsets: Sequence[int], rows: int = 64
) -> list[Row]:
    """One document that begins `offsets` tokens into its window, with the positions of each mode.

    error: departure from FP64 at the same positions. moved: D against the document in front of the window, in
    the same arithmetic; moved_exact: the same in FP64, which is what the mode means to change.
    """
    length = vectors.k_TGH.shape[0]
    chosen = spread_rows(length, rows, vectors.k_TGH.device)
    found = []
    for mode in _MODES:
        front = _document_positions(mode, 0, length).to(vectors.k_TGH.device)
        exact_front = weights_of(vectors, EXACT, front, chosen)
        for offset in offsets:
            places = _document_positions(mode, offset, length).to(vectors.k_TGH.device)
            exact = weights_of(vectors, EXACT, places, chosen)
            for rope in ropes:
                here = weights_of(vectors, rope, places, chosen)
                error = compare(here, exact)
                moved = compare(here, weights_of(vectors, rope, front, chosen))
                found.append(
                    dict(
                        vectors=vectors.name,
                        mode=mode,
                        rope=rope.name,
                        offset=offset,
                        length=length,
                        error=error.total,
                        error_first_share=error.first_share,
                        moved=moved.total,
                        moved_first_share=moved.first_share,
                        moved_exact=compare(exact, exact_front).total,
                        first_attention=float(exact[:, :, 0].mean()),
                    )
                )
    return found


def _document_positions(mode: str, offset: int, length: int) -> Tensor:
    """Positions of a document of `length` tokens, its anchor included, behind another one of `offset`
    tokens.
    """
    borders = np.array([0, *([offset] if offset else []), offset + length])
    return torch.from_numpy(mode_positions(mode, borders, window_length=offset + length)[offset:])


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
