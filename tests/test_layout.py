"""Positions, placements and plans: for any documents and ranks, each token, transfer and pair once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchor_megatron.layout.modes import MODES, attention_cu_seqlens, positions, visible
from anchor_megatron.layout.placement import PLACEMENTS, Placement, balance, piece_areas, place
from anchor_megatron.layout.plan import Plan, check_plans, make_plans

Layout = tuple[np.ndarray, int, int]  # document borders, tokens a window, ranks


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three windows of any documents on one to nine ranks, which divide a window's tokens."""
    ranks, windows = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    length = ranks * draw(st.integers(1, 30))
    borders = {0}
    for window in range(windows):
        inner = draw(st.sets(st.integers(1, length - 1), max_size=length)) if length > 1 else set()
        borders |= {window * length + border for border in inner} | {(window + 1) * length}
    return np.array(sorted(borders)), length, ranks


def borders_of(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths])


NAMED = {
    "one token a document": (borders_of(*[1] * 72), 72, 8),
    "one document fills the window": (borders_of(72), 72, 8),
    "hundreds of tiny ones": (borders_of(*[1, 2, 1, 1, 3] * 72), 576, 9),
    "a document over all ranks": (borders_of(5, 102, 13), 120, 6),
    "lengths that divide by nothing": (borders_of(7, 29, 31, 53), 120, 5),
    "tiny ones behind a giant": (borders_of(97, *[1] * 23), 120, 4),
    "one token a rank": (borders_of(3, 1, 5), 9, 9),
    "two windows": (borders_of(11, 13, 23, 1), 24, 3),
}


def placed(kind: str, layout: Layout) -> Placement:
    cu_seqlens, length, ranks = layout
    return place(kind, cu_seqlens, context_parallel_size=ranks, window_length=length)


def computed_pairs(plans: list[Plan], tokens: int) -> np.ndarray:
    """How often each (query, key) pair is computed when the plans are carried out, int [T, T]."""
    count = np.zeros((tokens, tokens), dtype=int)
    for rank, plan in enumerate(plans):
        arriving = []
        for sender in plans:
            begin = sum(sender.send_counts[:rank])
            arriving.append(sender.token_index[sender.send_index[begin : begin + sender.send_counts[rank]]])
        keys = np.concatenate([plan.token_index, *arriving])[plan.key_index]
        for queries_rows, keys_seen in pieces_of(plan, keys):
            for offset, query in enumerate(queries_rows):
                np.add.at(count[query], keys_seen[: keys_seen.size - queries_rows.size + offset + 1], 1)
    return count


def pieces_of(plan: Plan, keys: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of every piece of a rank, and the tokens of its keys; causal from the last query backwards."""
    local, waiting = plan.token_index[: plan.local_tokens], plan.token_index[plan.local_tokens :]
    held = np.split(local, plan.cu_seqlens_local[1:-1]) if local.size else []
    late = np.split(waiting, plan.cu_seqlens_q[1:-1]) if waiting.size else []
    seen = np.split(keys, plan.cu_seqlens_k[1:-1])
    return [(piece, piece) for piece in held] + list(zip(late, seen, strict=False))


@given(layouts(), st.sampled_from(PLACEMENTS))
def test_any_layout_gives_whole_plans(layout: Layout, kind: str) -> None:
    placement = placed(kind, layout)
    check_plans(placement, make_plans(placement))


@given(layouts(), st.sampled_from(PLACEMENTS), st.sampled_from(MODES))
def test_plans_compute_exactly_the_visible_pairs(layout: Layout, kind: str, mode: str) -> None:
    spans = attention_cu_seqlens(mode, layout[0], window_length=layout[1])
    plans = make_plans(placed(kind, (spans, *layout[1:])))
    assert np.array_equal(computed_pairs(plans, int(spans[-1])), visible(spans))
    assert [plan.token_index.size for plan in plans] == [spans[-1] // layout[2]] * layout[2]


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("name", NAMED)
def test_named_layouts(name: str, kind: str) -> None:
    placement = placed(kind, NAMED[name])
    plans = make_plans(placement)
    check_plans(placement, plans)
    assert np.array_equal(computed_pairs(plans, int(placement.cu_seqlens[-1])), visible(placement.cu_seqlens))


def slow_position(mode: str, window_documents: list[int], document: int, index: int) -> int:
    """Position of token `index` of a document, by the words of `layout/modes.py`."""
    before = window_documents[:document]
    if mode == "document_reset":
        return index
    if mode == "anchor":  # anchors stand at 0; other tokens count the other tokens
        return 0 if index == 0 else sum(length - 1 for length in before) + index
    return sum(before) + index


@given(layouts(), st.sampled_from(MODES))
def test_positions_are_what_the_modes_say(layout: Layout, mode: str) -> None:
    borders, length, _ = layout
    expected = []
    for begin in range(0, int(borders[-1]), length):
        inside = borders[(borders >= begin) & (borders <= begin + length)]
        documents = np.diff(inside).tolist()
        for number, size in enumerate(documents):
            expected += [slow_position(mode, documents, number, index) for index in range(size)]
    assert positions(mode, borders, window_length=length).tolist() == expected


@given(layouts())
def test_a_token_sees_itself_and_the_past_of_its_document(layout: Layout) -> None:
    borders = layout[0][:12]
    document = [int(np.sum(borders[1:] <= token)) for token in range(borders[-1])]
    expected = [
        [k <= q and document[k] == document[q] for k in range(borders[-1])] for q in range(borders[-1])
    ]
    assert visible(borders).tolist() == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_one_document_is_placed_in_zigzag(ranks: int) -> None:
    tokens = 4 * ranks
    pairs = [{2 * i, 2 * i + 1, tokens - 2 * i - 2, tokens - 2 * i - 1} for i in range(ranks)]
    for kind in ("document", "zigzag"):
        placement = placed(kind, (borders_of(tokens), tokens, ranks))
        shares = [set(plan.token_index.tolist()) for plan in make_plans(placement)]
        assert sorted(shares, key=min) == pairs
        assert balance(placement) == 1.0


def test_documents_that_fit_stay_whole() -> None:
    placement = placed("document", (borders_of(*[6] * 8), 48, 4))
    assert all(sum(plan.recv_counts) == 0 for plan in make_plans(placement))
    assert balance(placement) == 1.0


def test_balance_is_the_largest_area_over_the_mean() -> None:
    placement = placed("contiguous", (borders_of(8), 8, 2))  # areas 1+2+3+4 and 5+6+7+8
    assert piece_areas(placement).tolist() == [10, 26]
    assert balance(placement) == pytest.approx(26 / 18)


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        ("striped", (borders_of(8), 8, 2), "placement: got 'striped', expected one of document, zigzag"),
        (
            "document",
            (borders_of(9), 9, 2),
            "tokens: got 9, expected a multiple of context_parallel_size = 2",
        ),
        (
            "zigzag",
            (borders_of(9, 9), 9, 2),
            "tokens: got 9, expected a multiple of context_parallel_size = 2",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(kind: str, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placed(kind, layout)


@pytest.mark.parametrize(
    ("mode", "borders", "message"),
    [
        ("causal", [0, 8], "mode: got 'causal', expected one of full, document"),
        ("anchor", [0], "expected to rise from 0"),
        ("anchor", [1, 8], "expected to rise from 0"),
        ("full", [0, 4, 4, 8], "expected to rise from 0"),
        ("document", [0, 6], "tokens: got 6, expected a multiple of window_length = 4"),
        ("document_reset", [0, 3, 8], "a document across the end of a window of 4 tokens"),
    ],
)
def test_bad_documents_are_refused(mode: str, borders: list[int], message: str) -> None:
    for function in (positions, attention_cu_seqlens):
        with pytest.raises(ValueError, match=message):
            function(mode, np.array(borders), window_length=4)


def split_document() -> tuple[Placement, list[Plan]]:
    """Documents of 3, 19 and 2 tokens on three ranks; every rank sends and receives."""
    placement = placed("zigzag", (borders_of(3, 19, 2), 24, 3))
    plans = make_plans(placement)
    assert all(plan.send_index.size and plan.key_index.size for plan in plans)
    return placement, plans


def changed(array: np.ndarray, at: int, value: int) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@given(st.sampled_from(["token_index", "send_index", "key_index"]), st.integers(0, 2), st.data())
def test_check_plans_finds_any_changed_index(name: str, rank: int, data: st.DataObject) -> None:
    placement, plans = split_document()
    plan = plans[rank]
    array = getattr(plan, name)
    reach = 24 if name == "token_index" else plan.token_index.size  # any other token, or own row
    at = data.draw(st.integers(0, array.size - 1))
    value = data.draw(st.integers(0, reach - 1).filter(lambda value: value != array[at]))
    plans[rank] = replace(plan, **{name: changed(array, at, value)})
    with pytest.raises(AssertionError):
        check_plans(placement, plans)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("token_index", "not owned exactly once"),
        ("send_index", "does not see its document's keys"),
        ("key_index", "does not see its document's keys"),
        ("send_counts", "sent is not received"),
        ("area", "visible pairs"),
    ],
)
def test_check_plans_names_what_is_wrong(field: str, message: str) -> None:
    placement, plans = split_document()
    plan = plans[1]
    wrong = {
        "token_index": changed(plan.token_index, 0, int(plan.token_index[1])),
        "send_index": plan.send_index[::-1].copy(),
        "key_index": plan.key_index[::-1].copy(),
        "send_counts": plan.send_counts[::-1],
        "area": plan.area + 1,
    }
    plans[1] = replace(plan, **{field: wrong[field]})
    with pytest.raises(AssertionError, match=message):
        check_plans(placement, plans)
