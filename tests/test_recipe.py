"""What an epoch takes: sources and data sets at their shares, long documents more often, a split of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_packing import write_documents
from test_windows import corpus_of

from anchor_megatron.data.corpus import SPLITS, Corpus
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.recipe import Recipe, make_groups


def test_sources_keep_their_share_and_long_documents_gain_theirs(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lengths, sources = generator.integers(1, 200, 4000), generator.integers(0, 3, 4000)
    corpus = corpus_of(tmp_path, lengths, sources)
    groups = make_groups(corpus, weights=[1], sampler="upsample_long", long_tokens=150, long_weight=4.0)
    recipe = Recipe(groups, seed=0)
    taken = np.concatenate([recipe.order(epoch) for epoch in range(4)])
    own, found = (
        np.bincount(sources[chosen], weights=lengths[chosen]) for chosen in (np.arange(4000), taken)
    )
    assert found == pytest.approx(4 * own, rel=0.02)
    times = np.bincount(taken, minlength=4000) / 4
    for source in range(3):
        of_source = sources == source
        long, short = times[of_source & (lengths > 150)], times[of_source & (lengths <= 150)]
        assert long.mean() / short.mean() == pytest.approx(4, rel=0.02)
        for group in (long, short):
            assert np.ptp(group) <= 0.25, "none comes twice more often than another"


def test_a_blend_takes_each_set_by_its_weight_and_shows_its_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sets = [
        write_documents(tmp_path / "a" / "web", [20] * 90),
        write_documents(tmp_path / "b" / "code", [60] * 10),
    ]
    with pytest.raises(ValueError, match="data sets of different vocab_size"):
        Corpus(sets)
    sets[1] = write_documents(tmp_path / "b" / "code", [60] * 30)
    corpus = Corpus(sets)
    assert corpus.source_names == ["web", "code"]
    recipe = Recipe(make_groups(corpus, weights=[1, 3]), seed=0)
    taken = np.concatenate([recipe.order(epoch) for epoch in range(3)])
    share = corpus.lengths[taken[taken >= 90]].sum() / corpus.lengths[taken].sum()
    assert share == pytest.approx(0.75, abs=0.01)
    assert np.ptp(np.bincount(taken, minlength=120)[:90]) <= 1
    documents = np.array([95, 3, 119, 0])
    found = corpus.tokens(documents, np.array([0, 2, 59, 0]), np.array([3, 5, 60, 1]))
    assert found.tolist() == [302, 303, 304, 64, 65, 66, 1801, 2]


def test_sources_that_are_not_the_documents_are_refused(tmp_path: Path) -> None:
    corpus_of(tmp_path, [3, 4], [0, 1])
    for wrong in (np.zeros(3, dtype=np.uint8), np.array([0, 2], dtype=np.uint8), np.zeros(2)):
        np.save(tmp_path / "set_sources.npy", wrong)
        with pytest.raises(
            ValueError, match="set_sources.npy: got .* expected for each of 2 documents an entry"
        ):
            Documents(tmp_path / "set")


def test_splits_are_by_document_and_the_same_for_every_seed(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, range(1, 101))
    parts = [corpus.split(0, [0.8, 0.15, 0.05], name) for name in SPLITS]
    assert [part.size for part in parts] == [80, 15, 5]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    for seed in (0, 1):
        groups = make_groups(corpus, weights=[1], splits=[0.8, 0.15, 0.05], split="valid")
        assert set(Recipe(groups, seed=seed).order(0)) == set(parts[1])
    with pytest.raises(ValueError, match="data.split: got no documents of .* for test"):
        make_groups(corpus, weights=[1], splits=[0.999, 0.001, 0.0], split="test")
