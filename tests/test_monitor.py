"""Attention under watch: figures against the dense definition, in parallel too, and at no other step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from anchor_megatron.config import Config
from anchor_megatron.model.builder import build_model
from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.precision.attention import spread_rows
from anchor_megatron.testing.models import batch_of, random_window, tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.monitor import QUERIES, Monitor
from anchor_megatron.training.setup import initialize_ranks

LENGTHS = [9, 40, 15]  # the second is the longest; a rank of two holds it whole


def watched_on_rank(rank: int, world_size: int, config: Config) -> tuple[dict[str, float], list[Any]]:
    """The figures of one watched forward pass, and each layer's queries and keys on this rank."""
    initialize_ranks(config)
    gpt = build_model(config)
    batch, _ = batch_of(
        [random_window(lengths=LENGTHS, vocab_size=90, seed=1)],
        config,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
    )
    kept: list[Any] = []
    for layer in gpt.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda module, inputs: kept.append((inputs[0][:, 0], inputs[1][:, 0]))
        )
    monitor = Monitor(config, gpt)
    arguments = (batch.tokens, batch.positions, None)
    figures = []
    for step in (1, 2):
        with monitor.watch(step) as one, torch.no_grad():
            gpt(*arguments, packed_seq_params=PlannedSeqParams(plan=batch.plan))
        figures.append(one)
    assert figures[0] == {}, "the first step is not watched"
    return figures[1], kept[: config.model.num_layers]


def config_of(**parallel: int) -> Config:
    model = dict(init_std=0.2, num_layers=2)  # weights so large that attention is far from even
    return tiny_config(model=model, parallel=parallel, log=dict(precision_interval=2))


def test_figures_are_those_of_dense_attention() -> None:
    [(figures, kept)] = run_ranks(1, watched_on_rank, config_of())
    assert len(figures) == 6
    rows = spread_rows(40, QUERIES)
    for layer, (q, k) in enumerate(kept):
        q, k = q[9:49], k[9:49].repeat_interleave(2, dim=1)
        scores = torch.einsum("qnh,knh->nqk", q, k) / 4
        scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf"))[:, rows]
        assert figures[f"precision/layer_{layer}/anchor_share"] == pytest.approx(
            scores.softmax(dim=-1)[..., 0].mean().item(), rel=1e-4
        )
        assert figures[f"precision/layer_{layer}/largest_logit"] == pytest.approx(
            scores.max().item(), rel=1e-5
        )
        assert 0 < figures[f"precision/layer_{layer}/shift_difference"] < 1e-5  # in fp32


def test_tensor_parallel_ranks_see_the_same_as_one() -> None:
    [(alone, _)] = run_ranks(1, watched_on_rank, config_of())
    found = run_ranks(2, watched_on_rank, config_of(tensor=2))
    assert found[0][0] == found[1][0]
    for name, value in alone.items():
        if not name.endswith("shift_difference"):
            assert found[0][0][name] == pytest.approx(value, rel=1e-4), name


def test_context_parallel_ranks_each_look_at_a_piece_of_their_own() -> None:
    found = run_ranks(2, watched_on_rank, config_of(context=2))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 6
    assert all(value > 0 for value in found[0][0].values())
