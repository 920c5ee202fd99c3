"""Windows under every option: each token once and in order, labels, leads, counts; any window directly."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import ANCHOR, epoch_windows, write_documents

from anchor_megatron.data.arrange import PACKINGS
from anchor_megatron.data.assemble import Labels, Leads, assemble
from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.interleave import interleaved_slots
from anchor_megatron.data.packing import Packing, WindowDataset
from anchor_megatron.data.stream import Pieces
from anchor_megatron.data.window import Window
from anchor_megatron.testing.lengths import draw_lengths

END = 10**6
LENGTH_TABLE = Path(__file__).parents[1] / "benchmarks" / "document_lengths.csv"


def corpus_of(folder: Path, lengths: Sequence[int], sources: Sequence[int] | None = None) -> Corpus:
    """Documents of consecutive numbers, from sources "s0", "s1", ... where these are given."""
    documents = write_documents(folder / "set", list(map(int, lengths)))
    if sources is not None:
        documents.summary.sources[:] = [f"s{number}" for number in range(max(sources) + 1)]
        documents.summary.write(folder / "set.json")
        np.save(folder / "set_sources.npy", np.array(sources, dtype=np.uint8))
        documents = Documents(folder / "set")
    return Corpus([documents])


def rows_by_document(windows: list[Window], corpus: Corpus, tags: list[list[int]] | None) -> dict[str, Any]:
    """What the windows of an epoch show, taken apart row by row: own tokens, labels, counts."""
    found: dict[str, Any] = dict(tokens=[], labels=[], tags=0, pieces=0, padding=0, joined=0)
    first_tokens = 2 + np.cumsum([0, *corpus.lengths[:-1]])
    for window in windows:
        for document, offset, start, stop in zip(
            window.document_ids,
            window.document_offsets,
            window.cu_seqlens,
            window.cu_seqlens[1:],
            strict=False,
        ):
            assert window.tokens[start] == ANCHOR
            if document < 0:
                assert stop == window.tokens.size, "padding is last"
                assert (window.tokens[start:] == ANCHOR).all() and not window.loss_mask[start:].any()
                found["padding"] += stop - start
                continue
            lead = [ANCHOR, *(tags[corpus.sources[document]] if tags else [])]
            assert window.tokens[start : start + len(lead)].tolist() == lead
            assert not window.loss_mask[start : start + len(lead) - 1].any(), "nothing is trained on a lead"
            own = window.tokens[start + len(lead) : stop]
            assert own.size and own[0] == first_tokens[document] + offset
            found["tokens"].append(own)
            found["tags"] += len(lead) - 1
            found["pieces"] += 1
            firsts = np.isin(own, first_tokens)
            found["joined"] += int(firsts[1:].sum())
            # inside a piece tokens count on, but for a joined document's first
            assert (np.diff(own)[~firsts[1:]] == 1).all()
        found["labels"].append(np.stack([window.tokens, window.labels], axis=1)[window.loss_mask])
        assert not window.labels[~window.loss_mask].any()
    return found


@settings(max_examples=250)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any),
    seq_length=st.integers(6, 48),
    kind=st.sampled_from(PACKINGS),
    lookahead=st.integers(1, 4),
    most_units=st.sampled_from([None, 1, 3]),
    tagged=st.booleans(),
    join=st.booleans(),
    shortest=st.integers(0, 8),
    interleave=st.sampled_from([0, 1, 5]),
    shuffle=st.booleans(),
    labels=st.sampled_from([Labels(), Labels(anchor_loss=True), Labels(end_token=END)]),
    seed=st.integers(0, 5),
)
def test_an_epoch_shows_every_token_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_length: int,
    kind: str,
    lookahead: int,
    most_units: int | None,
    tagged: bool,
    join: bool,
    shortest: int,
    interleave: int,
    shuffle: bool,
    labels: Labels,
    seed: int,
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("data"), lengths, [n % 2 for n in range(len(lengths))])
    kept = [n for n, length in enumerate(lengths) if length and (join or length >= shortest)]
    if not kept:
        return
    tags = [[7 * END], [8 * END, 9 * END, 9 * END]][: max(corpus.sources) + 1] if tagged else None
    packing = Packing(kind, lookahead, 2, most_units, shortest, join, interleave, shuffle)
    arguments: dict[str, Any] = dict(seq_length=seq_length, anchor_token=ANCHOR, seed=seed, labels=labels)
    dataset = WindowDataset(corpus, packing=packing, tags=tags, **arguments)
    windows = epoch_windows(dataset, 0)
    found = rows_by_document(windows, corpus, tags)

    firsts = 2 + np.cumsum([0, *lengths[:-1]])
    every = np.concatenate([np.arange(firsts[n], firsts[n] + lengths[n]) for n in kept])
    assert np.array_equal(np.sort(np.concatenate(found["tokens"])), every), "each token once"
    pairs = np.concatenate(found["labels"])
    inside = np.setdiff1d(every, firsts[kept])
    expected = np.stack([inside - 1, inside], axis=1).tolist()
    if labels.end_token is not None:
        expected += [[firsts[n] + lengths[n] - 1, END] for n in kept]
    if not labels.anchor_loss:
        assert sorted(pairs.tolist()) == sorted(expected), "each label once, behind the token before it"
    else:
        assert np.isin(pairs[:, 1], every).all() and len(pairs) == len(inside) + found["pieces"] - sum(
            int(w.document_offsets[i] > 0) for w in windows for i in range(w.document_ids.size)
        )
    check_counts(windows, found, corpus, kept, seq_length, most_units)
    for window in windows:
        check_slots(window, interleave)
    again = pickle.loads(pickle.dumps(WindowDataset(corpus, packing=packing, tags=tags, **arguments)))
    for n in reversed(range(len(windows))):
        assert_same(again[n], windows[n])


def check_counts(
    windows: list[Window],
    found: dict[str, Any],
    corpus: Corpus,
    kept: list[int],
    seq_length: int,
    most_units: int | None,
) -> None:
    for window in windows:
        counts = window.counts
        assert counts.tokens + counts.pieces + counts.tags + counts.padding == seq_length
        assert most_units is None or counts.pieces <= most_units
    total = {
        name: sum(getattr(window.counts, name) for window in windows) for name in vars(windows[0].counts)
    }
    for name in ("tags", "pieces", "padding", "joined"):
        assert total[name] == found[name], name
    assert total["dropped"] == (corpus.lengths > 0).sum() - len(kept)
    assert total["pieces"] + total["joined"] - total["cut"] == len(kept), "every document ends once"


def check_slots(window: Window, interleave: int) -> None:
    if not interleave:
        assert window.slots is None
        return
    assert window.slots is not None
    assert np.array_equal(np.sort(window.slots), np.arange(window.tokens.size)), "each place once"
    for start, stop in zip(window.cu_seqlens, window.cu_seqlens[1:], strict=False):
        assert (np.diff(window.slots[start:stop]) > 0).all(), "order is kept inside a document"
    filled = window.tokens.size - window.counts.padding
    assert (window.slots[filled:] == np.arange(filled, window.tokens.size)).all(), "padding stays behind"


def assert_same(one: Window, other: Window) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(other, name)), name


def test_shuffled_windows_are_the_same_ones_and_mix_a_long_document(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [400, *[5] * 100])
    options: dict[str, Any] = dict(seq_length=11, anchor_token=ANCHOR, seed=3)
    plain = WindowDataset(corpus, **options)
    shuffled = WindowDataset(corpus, packing=Packing(shuffle=True), **options)
    size = plain.windows_per_epoch(0)
    shown = [shuffled[n] for n in range(size)]

    def tokens(windows: Sequence[Window]) -> list[bytes]:
        return [window.tokens.tobytes() for window in windows]

    assert sorted(tokens(shown)) == sorted(tokens(epoch_windows(plain, 0)))
    halves = [sum(0 in window.document_ids for window in half) for half in (shown[:50], shown[50:])]
    assert min(halves) > 10, f"windows of the long document in each half: {halves}"
    following = [shuffled[n] for n in range(size, size + shuffled.windows_per_epoch(1))]
    assert tokens(following) != tokens(shown)
    resumed = WindowDataset(corpus, packing=Packing(shuffle=True), **options)
    assert_same(resumed[size + 7], following[7])


def test_a_window_that_looking_ahead_left_empty_is_padding(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [3, 4])
    stream = WindowDataset(corpus, seq_length=8, anchor_token=ANCHOR, seed=0)._stream(0)
    nothing = np.zeros(0, dtype=np.int64)
    pieces = Pieces(nothing, nothing, nothing)
    window = assemble(corpus, stream, pieces, seq_length=8, leads=Leads(ANCHOR), labels=Labels(True, END))
    assert window.counts.padding == 8 and not window.loss_mask.any() and window.document_ids.tolist() == [-1]
    is_own = np.zeros(8, dtype=bool)
    slots = interleaved_slots(window.cu_seqlens, is_own, filled=0, mean=2, generator=np.random.default_rng(0))
    assert slots.tolist() == list(range(8))


def test_chunks_are_of_the_length_asked_for_and_mixed(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [5000] * 20)
    dataset = WindowDataset(
        corpus, seq_length=40_000, anchor_token=ANCHOR, seed=0, packing=Packing(interleave=100)
    )
    slots = dataset[0].slots
    assert slots is not None
    chunks = 1 + (np.diff(slots) != 1).sum()
    assert 40_000 / chunks == pytest.approx(100, rel=0.15)
    ends = [int(slots[stop - 1]) for stop in dataset[0].cu_seqlens[1:]]
    assert min(ends) > 30_000, "every document reaches through most of the window"


def test_looking_ahead_balances_batches_and_cuts_fewer_documents(tmp_path: Path) -> None:
    lengths = draw_lengths(LENGTH_TABLE, tokens=2_000_000, longest=32_768, seed=0)
    corpus = corpus_of(tmp_path, lengths)
    cut, balance = {}, {}
    for kind in PACKINGS:
        packing = Packing(kind, lookahead=8, batch_windows=8)
        dataset = WindowDataset(corpus, seq_length=8192, anchor_token=ANCHOR, seed=0, packing=packing)
        windows = epoch_windows(dataset, 0)
        areas = np.array([(np.diff(window.cu_seqlens) ** 2).sum() for window in windows])
        steps = areas[: len(areas) // 8 * 8].reshape(-1, 8)
        balance[kind] = float((steps.max(axis=1) / steps.mean(axis=1)).mean())
        cut[kind] = sum(window.counts.cut for window in windows)
    assert balance["plain"] > 1.8 and balance["balanced"] < 1.2
    whole_windows = (lengths // 8192).sum()  # which longer documents have to be cut into
    assert cut["plain"] > 200 and max(cut["best_fit"], cut["balanced"]) - whole_windows < 50


def test_a_document_of_ten_million_tokens_trains_across_windows(tmp_path: Path) -> None:
    length, seq_length = 10_000_000, 131_072
    corpus = corpus_of(tmp_path, [length, 1000])
    dataset = WindowDataset(corpus, seq_length=seq_length, anchor_token=ANCHOR, seed=0)
    count = dataset.windows_per_epoch(0)
    assert count == -(-(length + 1001) // (seq_length - 1))
    trained = np.sort(np.concatenate([dataset[n].labels[dataset[n].loss_mask] for n in range(count)]))
    every = np.arange(3, length + 1002)  # but the documents' first tokens, 2 and length + 2
    assert np.array_equal(trained, every[every != length + 2])


def test_joined_documents_are_long_enough_and_of_one_source(tmp_path: Path) -> None:
    lengths = [3, 50, 1, 2, 4, 60, 1, 1, 3, 2, 2, 1] * 3
    corpus = corpus_of(tmp_path, lengths, [n % 2 for n in range(len(lengths))])
    packing = Packing(shortest=6, join_short=True)
    dataset = WindowDataset(corpus, seq_length=500, anchor_token=ANCHOR, seed=1, packing=packing)
    [window] = epoch_windows(dataset, 0)
    firsts = 2 + np.cumsum([0, *lengths[:-1]])
    for start, stop in zip(window.cu_seqlens[:-2], window.cu_seqlens[1:-1], strict=True):
        own = window.tokens[start + 1 : stop]
        assert own.size >= 6
        documents = np.searchsorted(firsts, own[np.isin(own, firsts)])
        assert len(set(corpus.sources[documents])) == 1
    assert window.counts.joined > 20 and window.counts.dropped == 0
