"""Training between import and export, and models that were never imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import TOKENS, VOCAB, YARN, forward, hf_logits, make_hf, our_config
from transformers import AutoTokenizer, GenerationConfig

from anchor_megatron.config import Config
from anchor_megatron.convert.exporting import export_checkpoint
from anchor_megatron.convert.importing import import_checkpoint
from anchor_megatron.convert.rows import same_values
from anchor_megatron.convert.sources import open_source
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.testing.models import random_window, tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.checkpoint import load_pretrained, save_checkpoint
from anchor_megatron.training.setup import initialize_ranks
from anchor_megatron.training.step import build_trainee, train_step


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set: training reads no token of it here, but a checkpoint keeps its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "code.txt").write_text("def f(x): return x\n" * 9)
    preprocess(Job((folder / "code.txt",), folder / "corpus", train_tokenizer=270))
    return str(folder / "corpus")


def windows(config: Config) -> list[PlannedBatch]:
    """Two steps of one micro-batch."""
    return [
        plan_batch(
            [random_window(lengths=[9, 30, 1], vocab_size=VOCAB, seed=seed)],
            mode="anchor",
            placement="document",
            context_parallel_size=1,
            context_parallel_rank=0,
        )
        for seed in range(2)
    ]  # fmt: skip


def train_on_rank(rank: int, world_size: int, config: Config, pretrained: str) -> torch.Tensor:
    """Two steps from the imported weights, a checkpoint, and the trained model's logits."""
    initialize_ranks(config)
    trainee = build_trainee(config)
    load_pretrained(trainee, pretrained)
    batches = iter(windows(config))
    for _ in range(2):
        train_step(config, trainee, batches)
    save_checkpoint(config, trainee, step=2)
    return forward(trainee.gpt, config.parallel.tensor)


TRAINED = [
    ("llama", 4, dict(tensor=2, pipeline=2)),
    ("qwen2 tied", 4, dict(tensor=2, pipeline=2)),
    ("mixtral", 2, dict(pipeline=2)),
]


@pytest.mark.parametrize(("case", "world_size", "parallel"), TRAINED, ids=lambda value: str(value)[:20])
def test_import_train_export(
    case: str,
    world_size: int,
    parallel: dict[str, int],
    prefix: str,
    tmp_path: Path,
) -> None:
    hf, megatron = make_hf(case, tmp_path / "hf"), tmp_path / "megatron"
    import_checkpoint(hf, megatron, say=lambda message: None)
    config = our_config(megatron, **parallel)
    config.data.mode, config.data.train, config.optimizer.lr = "anchor", prefix, 1e-2
    config.checkpoint.directory, config.checkpoint.pretrained = str(tmp_path / "run"), str(megatron)
    ours = run_ranks(world_size, train_on_rank, config, str(megatron))[-1]
    export_checkpoint(tmp_path / "run", tmp_path / "trained", say=lambda message: None)
    theirs = hf_logits(tmp_path / "trained")
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (theirs - hf_logits(hf)).abs().max() > 0.1, "training must have changed the model"


def save_on_rank(rank: int, world_size: int, config: Config) -> torch.Tensor:
    initialize_ranks(config)
    trainee = build_trainee(config)
    save_checkpoint(config, trainee, step=0)
    return forward(trainee.gpt, 1)


@pytest.mark.parametrize(
    ("features", "architecture"),
    [
        (dict(), "LlamaForCausalLM"),
        (dict(tie_embeddings=True, add_qkv_bias=True), "Qwen2ForCausalLM"),
        (dict(qk_layernorm=True, kv_channels=20, rope_scaling=YARN), "Qwen3ForCausalLM"),
        (dict(num_experts=4), "MixtralForCausalLM"),
        (dict(num_experts=4, qk_layernorm=True, moe_normalize_topk=False), "Qwen3MoeForCausalLM"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_model_trained_from_scratch_becomes_the_family_with_its_features(
    features: dict[str, Any], architecture: str, prefix: str, tmp_path: Path
) -> None:
    config = tiny_config(vocab_size=VOCAB, seq_length=len(TOKENS), model=features | dict(init_std=0.2))
    config.checkpoint.directory, config.data.train = str(tmp_path / "run"), prefix
    ours = run_ranks(1, save_on_rank, config)[0]
    shutil.rmtree(tmp_path / "run" / "step_0000000" / "tokenizer", ignore_errors=True)
    said: list[str] = []
    export_checkpoint(tmp_path / "run", tmp_path / "hf", say=said.append)
    assert "no tokenizer" in said[0]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [architecture]
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), ours, atol=1e-5, rtol=1e-5)
    # and back: what we wrote is what we read
    import_checkpoint(tmp_path / "hf", tmp_path / "again", say=said.append)
    export_checkpoint(tmp_path / "again", tmp_path / "twice", say=said.append)
    first, second = open_source(tmp_path / "hf"), open_source(tmp_path / "twice")
    assert all(same_values(rows, second.tensors[name]) for name, rows in first.tensors.items())


def test_tokenizer_and_generation_settings_come_along(prefix: str, tmp_path: Path) -> None:
    hf = make_hf("llama", tmp_path / "hf")
    (hf / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 3], "top_k": 7}')
    for file in Path(f"{prefix}_tokenizer").iterdir():
        shutil.copy(file, hf)
    import_checkpoint(hf, tmp_path / "megatron", say=print)
    config = our_config(tmp_path / "megatron")
    config.checkpoint.directory, config.data.train = str(tmp_path / "run"), prefix
    config.checkpoint.pretrained = str(tmp_path / "megatron")
    run_ranks(1, save_on_rank, config)
    for number, checkpoint in enumerate((tmp_path / "megatron", tmp_path / "run")):
        said: list[str] = []
        out = tmp_path / f"out{number}"
        export_checkpoint(checkpoint, out, say=said.append)
        assert not said
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.decode(tokenizer("def f(x)")["input_ids"]) == "def f(x)"
        assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 3]


def test_a_tokenizer_given_by_hand_names_the_special_tokens(prefix: str, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=270, seq_length=len(TOKENS), data=dict(train=prefix))
    config.checkpoint.directory = str(tmp_path / "run")
    run_ranks(1, save_on_rank, config)
    export_checkpoint(tmp_path / "run", tmp_path / "out", tokenizer=Path(f"{prefix}_tokenizer"), say=print)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert None not in ids and (generation.bos_token_id, generation.eos_token_id) == ids
