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

from anchor_megatron.data.documents import Documents, Summary
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.sampler import window_indices

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


def epoch_windows(windows: WindowDataset, epoch: int) -> list:
    first = sum(windows.windows_per_epoch(e) for e in range(epoch))
    return [windows[first + i] for i in range(windows.windows_per_epoch(epoch))]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=15),
    seq_length=st.integers(2, 24),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 2),
)
def test_every_token_and_every_label_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, seed: int, epoch: int
) -> None:
    documents = write_documents(tmp_path_factory.mktemp("data") / "set", lengths)
    windows = epoch_windows(
        WindowDataset(documents, seq_length=seq_length, anchor_token=ANCHOR, seed=seed), epoch
    )
    tokens, labels = [], []
    for window in windows:
        assert window.tokens.size == window.labels.size == window.loss_mask.size == seq_length
        assert (window.tokens[window.cu_seqlens[:-1]] == ANCHOR).all() and window.cu_seqlens[-1] == seq_length
        is_own = window.tokens != ANCHOR
        assert (~is_own).sum() - window.padding_tokens == (window.document_ids >= 0).sum()
        tokens.append(window.tokens[is_own])
        labels.append(window.labels[window.loss_mask])
        # a label is the number after its token: never another document's
        assert (window.labels[window.loss_mask] == window.tokens[window.loss_mask] + 1).all()
        assert not window.loss_mask[~is_own].any() and not window.labels[~window.loss_mask].any()
        for piece, (document, offset) in enumerate(
            zip(window.document_ids, window.document_offsets, strict=True)
        ):
            if document >= 0:
                start, stop = window.cu_seqlens[piece : piece + 2]
                expected = documents.tokens(document, offset, offset + stop - start - 1)
                assert np.array_equal(window.tokens[start + 1 : stop], expected)
    total = sum(lengths)
    assert np.array_equal(np.sort(np.concatenate(tokens)), np.arange(2, total + 2))
    firsts = 2 + np.cumsum([0, *lengths[:-1]])
    assert np.array_equal(np.sort(np.concatenate(labels)), np.setdiff1d(np.arange(2, total + 2), firsts))


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
    assert window.padding_tokens == 4 and list(window.document_ids) == [0, -1]
    assert list(window.loss_mask) == [False, True, True, True, True] + [False] * 5


def test_the_anchor_learns_the_first_token_only_where_asked(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "set", [15])
    windows = WindowDataset(documents, seq_length=9, anchor_token=ANCHOR, seed=0, anchor_loss=True)
    assert windows[0].loss_mask[0] and windows[0].labels[0] == 2
    assert not windows[1].loss_mask[0], "the anchor of a document that goes on predicts nothing"


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
