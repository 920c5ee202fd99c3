"""The same (seed, step) gives the same windows: on any number of replicas, from any step, under any options.

One reader goes straight through all steps; readers that begin anew at any step, as a resumed run does, and
see only their replica's share must find the same windows. `test_windows.py` has the loader's workers.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import ANCHOR, write_documents
from test_windows import assert_same, corpus_of

from anchor_megatron.config import Config
from anchor_megatron.data.arrange import PACKINGS
from anchor_megatron.data.packing import Packing, WindowDataset
from anchor_megatron.data.window import Window
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.training import loader, setup
from anchor_megatron.training.batch import PlannedBatch

STEPS, GLOBAL_BATCH = 12, 8


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two data sets of 60 documents: a run of all steps goes through them more than once."""
    found = []
    generator = np.random.default_rng(0)
    lengths = [300, *generator.integers(1, 80, 60).tolist()]
    for weight, name in enumerate(("a", "b"), 1):
        folder = tmp_path_factory.mktemp(name)
        shuffled = generator.permutation(lengths).tolist()  # of as many tokens: one vocabulary
        corpus_of(folder, shuffled, generator.integers(0, 2, 61).tolist())
        found.append(dict(prefix=str(folder / "set"), weight=float(weight)))
    return found


@contextmanager
def as_replica(replica: int, replicas: int) -> Iterator[pytest.MonkeyPatch]:
    """Lets this process be one of several replicas."""
    state = SimpleNamespace(
        get_data_parallel_rank=lambda: replica,
        get_data_parallel_world_size=lambda: replicas,
        get_context_parallel_rank=lambda: 0,
        get_context_parallel_world_size=lambda: 1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "parallel_state", state)
        patch.setattr(setup, "parallel_state", state)
        yield patch


def windows_of(config: Config, *, step: int, replica: int, replicas: int) -> list[Window]:
    """What a replica that starts at `step` reads in that step, and nothing before it."""
    with as_replica(replica, replicas):
        dataset = loader.BatchDataset(config, loader.open_windows(config))
        batches = range(step * dataset.micro_batches, (step + 1) * dataset.micro_batches)
        return [window for batch in batches for window in dataset.windows_of(batch)]


@settings(max_examples=40)
@given(
    kind=st.sampled_from(PACKINGS),
    lookahead=st.integers(1, 3),
    interleave=st.sampled_from([0, 9]),
    sampler=st.sampled_from(["plain", "upsample_long"]),
    blend=st.booleans(),
    split=st.sampled_from([[1.0, 0.0, 0.0], [0.7, 0.2, 0.1]]),
    short=st.sampled_from([(0, "drop"), (20, "drop"), (20, "join")]),
    layout=st.sampled_from([(1, 2), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)]),
    step=st.integers(0, STEPS - 1),
    seed=st.integers(0, 3),
)
def test_any_replica_at_any_step_reads_its_share(
    sets: list[dict[str, Any]],
    kind: str,
    lookahead: int,
    interleave: int,
    sampler: str,
    blend: bool,
    split: list[float],
    short: tuple[int, str],
    layout: tuple[int, int],
    step: int,
    seed: int,
) -> None:
    replicas, micro_batch_size = layout
    data = dict(
        train=sets if blend else sets[0]["prefix"], seq_length=96, packing=kind, packing_lookahead=lookahead,
        interleave=interleave, sampler=sampler, long_tokens=60, split=split, min_document_tokens=short[0],
        short_documents=short[1],
    )  # fmt: skip
    train = dict(steps=STEPS, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size, seed=seed)
    config = tiny_config(vocab_size=10**6, data=data, train=train)
    reader = loader.open_windows(config)
    straight = [reader[n] for n in range((step + 1) * GLOBAL_BATCH)][step * GLOBAL_BATCH :]
    shares = [
        windows_of(config, step=step, replica=replica, replicas=replicas) for replica in range(replicas)
    ]
    groups = GLOBAL_BATCH // (replicas * micro_batch_size)
    together = [
        window
        for group in range(groups)
        for share in shares
        for window in share[group * micro_batch_size : (group + 1) * micro_batch_size]
    ]
    assert len(together) == GLOBAL_BATCH
    for one, other in zip(together, straight, strict=True):
        assert_same(one, other)


def test_workers_share_what_their_rank_has_laid_out(sets: list[dict[str, Any]]) -> None:
    """They are forked, also where the process starts others in another way."""
    data = dict(train=sets[0]["prefix"], seq_length=96, num_workers=2)
    config = tiny_config(vocab_size=10**6, data=data, train=dict(steps=2, global_batch_size=4))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with as_replica(0, 1) as patch:
            patch.setattr(loader, "plan_batch", lambda windows, **options: os.getppid())
            windows = loader.open_windows(config)
            found = list(loader.batches(config, windows, first_step=0, pin_memory=False))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert found == [os.getpid()] * 8, "workers that begin anew have the real function"


@pytest.mark.parametrize("interleave", [0, 1000])
@pytest.mark.parametrize("kind", PACKINGS)
def test_a_document_of_millions_of_tokens_is_told_in_order(
    tmp_path: Path, kind: str, interleave: int
) -> None:
    length = 3_000_000
    corpus = corpus_of(tmp_path, [40_000, length, 700, 90_000])
    packing = Packing(kind, lookahead=2, batch_windows=4, interleave=interleave)
    dataset = WindowDataset(corpus, seq_length=131_072, anchor_token=ANCHOR, seed=1, packing=packing)
    first = 2 + 40_000  # the document's first token; its tokens count on
    parts = []
    for n in range(dataset.windows_per_epoch(0)):
        window = dataset[n]
        told = window.tokens if window.slots is None else window.tokens[np.argsort(window.slots)]
        own = told[(told >= first) & (told < first + length)]
        assert (np.diff(own) > 0).all(), "in order inside a window"
        parts.append(own)
        of_it = np.isin(window.tokens, own) & window.loss_mask
        assert np.array_equal(window.labels[of_it], window.tokens[of_it] + 1), "each predicts the next"
    every = np.concatenate(parts)
    assert sum(part.size > 0 for part in parts) > length // 131_072
    assert np.array_equal(np.sort(every), np.arange(first, first + length)), "each token once"
    if kind == "plain":
        assert (np.diff(every) == 1).all(), "in order across windows"


def shards(
    monkeypatch: pytest.MonkeyPatch, config: Any, *, replicas: int, first_step: int
) -> list[list[PlannedBatch]]:
    """The batches of every replica from `first_step` to the last."""
    found = []
    for rank in range(replicas):
        state = SimpleNamespace(
            get_data_parallel_rank=lambda rank=rank: rank,
            get_data_parallel_world_size=lambda: replicas,
            get_context_parallel_rank=lambda: 0,
            get_context_parallel_world_size=lambda: 1,
        )
        monkeypatch.setattr(loader, "parallel_state", state)
        size = config.train.micro_batch_size * replicas
        monkeypatch.setattr(
            loader, "micro_batches_per_step", lambda c, s=size: c.train.global_batch_size // s
        )
        windows = loader.open_windows(config)
        found.append(list(loader.batches(config, windows, first_step=first_step, pin_memory=False)))
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("kind", ["plain", "balanced"])
def test_windows_are_the_same_on_any_replicas_workers_and_after_resuming(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(0).integers(1, 120, 200)
    write_documents(tmp_path / "set", lengths.tolist())
    data = dict(train=str(tmp_path / "set"), packing=kind, packing_lookahead=2, interleave=9, num_workers=0)
    config = tiny_config(
        vocab_size=int(lengths.sum()) + 2, data=data, train=dict(steps=24, global_batch_size=8)
    )

    def rows(batches: list[PlannedBatch]) -> list[list[torch.Tensor]]:
        names = ("tokens", "labels", "positions", "loss_mask")
        device = torch.device("cpu")
        return [[getattr(batch.to(device), name) for name in names] for batch in batches]

    [[*straight]] = shards(monkeypatch, config, replicas=1, first_step=0)
    expected = rows(straight)
    assert len(expected) == 24 * 8
    for replicas, workers, first in ((8, 0, 0), (8, 1, 13), (1, 4, 5), (8, 4, 20), (2, 1, 23)):
        config.data.num_workers = workers
        found = [
            rows(batches) for batches in shards(monkeypatch, config, replicas=replicas, first_step=first)
        ]
        joined = [batch for together in zip(*found, strict=True) for batch in together]
        assert len(joined) == len(expected[first * 8 :])
        for one, other in zip(joined, expected[first * 8 :], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
