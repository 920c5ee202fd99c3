"""Windows: every token once, every label once, anchors where they belong, any window directly."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from anchor_megatron.data.assemble import Labels
from anchor_megatron.data.documents import Documents, Summary
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.sampler import window_indices
from anchor_megatron.data.stream import window_starts
from anchor_megatron.data.window import Window

ANCHOR = 1


def write_documents(prefix: Path, lengths: list[int]) -> Documents:
    """Documents of consecutive numbers, so that every token names its document and place."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    start = 2
    for length in lengths:
        builder.add_item(torch.arange(start, start + length))
        builder.end_document()
        start += length
    builder.finalize(f"{prefix}.idx")
    Summary(
        documents=len(lengths),
        tokens=start - 2,
        longest=max(lengths),
        empty=0,
        largest_token=start - 1,
        vocab_size=start,
        anchor_token=ANCHOR,
        tokenizer="none",
        sources=[],
    ).write(Path(f"{prefix}.json"))
    return Documents(prefix)


def epoch_windows(windows: WindowDataset, epoch: int) -> list[Window]:
    first = sum(windows.windows_per_epoch(e) for e in range(epoch))
    return [windows[first + i] for i in range(windows.windows_per_epoch(epoch))]


def pack_one_by_one(
    order: list[int], lengths: list[int], seq_length: int
) -> list[list[tuple[int, int, int]]]:
    """The definition: windows of pieces (document, first token, slots), filled one document after another."""
    windows: list[list[tuple[int, int, int]]] = [[]]
    room = seq_length
    for document in order:
        taken = 0
        while taken < lengths[document]:
            if room == 1:  # an anchor fits, but no token behind it
                windows[-1].append((-1, taken, 1))
                room = 0
            else:
                tokens = min(room - 1, lengths[document] - taken)
                windows[-1].append((document, taken, tokens + 1))
                taken, room = taken + tokens, room - tokens - 1
            if room == 0:
                windows, room = [*windows, []], seq_length
    if windows[-1]:
        windows[-1].append((-1, 0, room))
    return [window for window in windows if window]


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=15).filter(any),
    seq_length=st.integers(2, 24),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 2),
)
def test_windows_are_those_of_packing_one_document_after_another(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, seed: int, epoch: int
) -> None:
    documents = write_documents(tmp_path_factory.mktemp("data") / "set", lengths)
    windows = WindowDataset(documents, seq_length=seq_length, anchor_token=ANCHOR, seed=seed)
    found = epoch_windows(windows, epoch)
    pieces = [
        [
            *zip(
                w.document_ids.tolist(),
                w.document_offsets.tolist(),
                np.diff(w.cu_seqlens).tolist(),
                strict=True,
            )
        ]
        for w in found
    ]
    order = list(dict.fromkeys(document for window in pieces for document, *_ in window if document >= 0))
    assert sorted(order) == [document for document, length in enumerate(lengths) if length]
    assert pieces == pack_one_by_one(order, lengths, seq_length)
    for window in found:
        check_tokens_and_labels(documents, window, seq_length)
    labels = np.concatenate([window.labels[window.loss_mask] for window in found])
    every = np.arange(2, sum(lengths) + 2)
    firsts = 2 + np.cumsum([0, *lengths[:-1]])[np.array(lengths) > 0]
    assert np.array_equal(np.sort(labels), np.setdiff1d(every, firsts)), (
        "each token but a first is a label once"
    )


def check_tokens_and_labels(documents: Documents, window: Window, seq_length: int) -> None:
    assert window.tokens.shape == window.labels.shape == window.loss_mask.shape == (seq_length,)
    assert window.cu_seqlens[0] == 0 and window.cu_seqlens[-1] == seq_length
    starts, stops = window.cu_seqlens[:-1], window.cu_seqlens[1:]
    for document, offset, start, stop in zip(
        window.document_ids, window.document_offsets, starts, stops, strict=True
    ):
        shown = window.tokens[start:stop]
        if document < 0:
            assert (shown == ANCHOR).all() and not window.loss_mask[start:stop].any()
            continue
        own = documents.tokens(document, offset, offset + stop - start - 1)
        assert shown[0] == ANCHOR and np.array_equal(shown[1:], own)
        has_next = own + 1 < 2 + documents.lengths[: document + 1].sum()  # tokens count through all documents
        assert not window.loss_mask[start]
        assert np.array_equal(window.loss_mask[start + 1 : stop], has_next)
        assert np.array_equal(window.labels[start + 1 : stop], np.where(has_next, own + 1, 0))
    assert not window.labels[~window.loss_mask].any()


def test_a_window_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "set", [7, 30, 1, 12, 5])
    arguments = dict(seq_length=10, anchor_token=ANCHOR)
    forward = WindowDataset(documents, seed=3, **arguments)
    expected = [forward[n].tokens for n in range(40)]
    backward = pickle.loads(pickle.dumps(WindowDataset(documents, seed=3, **arguments)))
    for n in reversed(range(40)):
        assert np.array_equal(backward[n].tokens, expected[n])
    other = WindowDataset(documents, seed=4, **arguments)
    assert any(not np.array_equal(other[n].tokens, expected[n]) for n in range(5))
    assert not np.array_equal(  # epochs differ in order
        np.concatenate([w.tokens for w in epoch_windows(forward, 0)]),
        np.concatenate([w.tokens for w in epoch_windows(forward, 1)]),
    )


def test_the_last_window_of_an_epoch_is_padded_and_counted(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "set", [5])
    (window,) = epoch_windows(WindowDataset(documents, seq_length=10, anchor_token=ANCHOR, seed=0), 0)
    assert window.counts.padding == 4 and list(window.document_ids) == [0, -1]
    assert list(window.loss_mask) == [False, True, True, True, True] + [False] * 5


def test_the_anchor_learns_the_first_token_only_where_asked(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "set", [15, 15])
    arguments = dict(seq_length=9, anchor_token=ANCHOR, seed=0)
    plain = epoch_windows(WindowDataset(documents, **arguments), 0)
    trained = epoch_windows(WindowDataset(documents, **arguments, labels=Labels(anchor_loss=True)), 0)
    found = []
    for window, other in zip(plain, trained, strict=True):
        added = np.flatnonzero(other.loss_mask != window.loss_mask)
        assert (other.tokens[added] == ANCHOR).all() and other.loss_mask[added].all()
        found += other.labels[added].tolist()
    assert sorted(found) == [2, 17], "the anchor of a document that goes on, or of padding, predicts nothing"


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_steps_windows_do_not_depend_on_the_number_of_replicas(replicas: int) -> None:
    size, whole = 2, 16
    micro_batches = whole // (size * replicas)
    found = [
        list(window_indices(5, m, data_parallel_rank=r, data_parallel_size=replicas, micro_batch_size=size,
                            global_batch_size=whole))
        for m in range(micro_batches) for r in range(replicas)
    ]  # fmt: skip
    assert sum(found, []) == list(range(5 * whole, 6 * whole))


def test_starts_hold_over_many_blocks_of_guesses() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 20_000)
    borders, leads = np.concatenate([[0], np.cumsum(lengths)]), np.ones(lengths.size, dtype=np.int64)
    for seq_length in (2, 7, 64, 4096):
        found, taken, room = [0], 0, seq_length
        for length in lengths.tolist():
            left = length
            while left:
                if room < 2:
                    found.append(taken)
                    room = seq_length
                tokens = min(room - 1, left)
                taken, left, room = taken + tokens, left - tokens, room - tokens - 1
        assert window_starts(borders, leads, seq_length=seq_length).tolist() == [*found, taken]
