"""Reading a context on a GPU: what the cache answers is what a whole pass computes, to bf16's rounding."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from anchor_megatron.evaluation.reader import Reader
from anchor_megatron.model.builder import build_model
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.training.setup import initialize_ranks

QUESTION, ANSWER = [5, 6, 7], [8, 9, 10]


def test_the_cache_answers_as_a_whole_pass_does() -> None:
    config = tiny_config(
        vocab_size=512,
        seq_length=4096,
        model=dict(hidden_size=512, num_attention_heads=4, num_query_groups=2, init_std=0.05),
        train=dict(precision="bf16"),
    )
    initialize_ranks(config)
    try:
        reader = Reader(build_model(config))
        context = np.random.default_rng(0).integers(11, 512, 3000)
        reading = reader.read(context)
        others = [([20, 21], [22]), (QUESTION, ANSWER)]
        got = reader.answer_logits(reading, others)[1][-1]
        whole = reader.last_hidden(np.concatenate([context, QUESTION, ANSWER[:-1]]))
        with torch.no_grad():
            expected = reader.gpt.logits(whole[None].bfloat16()).float()[0]
        assert (got - expected).abs().max() < 0.03 * expected.abs().max()
        best = reader.generate(reading, [QUESTION], new_tokens=3)
        assert all(reader.score(reading, [(QUESTION, best[0])])[0].correct)
        losses = reader.losses(context, np.array([0, 3000]))
        assert np.isfinite(losses[:-1]).all() and np.isnan(losses[-1])
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
