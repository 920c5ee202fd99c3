"""Every family, both ways: the command, the logits, the bytes, the configuration; then other layouts."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from transformers import AutoConfig, AutoModelForCausalLM

from anchor_megatron.config import Config
from anchor_megatron.convert.exporting import checkpoint_folder, read_checkpoint_model
from anchor_megatron.convert.families import FAMILIES
from anchor_megatron.convert.rows import same_values
from anchor_megatron.convert.sources import open_source
from anchor_megatron.data.window import Window
from anchor_megatron.model.builder import build_model
from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.batch import plan_batch
from anchor_megatron.training.setup import initialize_ranks

Folders = dict[str, tuple[Path, Path, Path]]
VOCAB = 91
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 40)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=24.0)
# grouped queries, heads that are not hidden_size / heads wide, nothing a power of two
COMMON = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=72, num_hidden_layers=2,
              num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=64,
              bos_token_id=1, eos_token_id=2, pad_token_id=None, rms_norm_eps=1e-5)  # fmt: skip
THETA = dict(rope_theta=5e5)
MOE = dict(num_experts_per_tok=2, num_experts=4, moe_intermediate_size=24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, llama3": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3 | THETA)),
    "llama without groups": ("llama", dict(num_key_value_heads=6, head_dim=8, dtype="bfloat16")),
    "mistral, yarn": ("mistral", dict(sliding_window=None, rope_parameters=YARN | THETA)),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, dynamic": ("qwen2", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0) | THETA)),
    "qwen3, linear": ("qwen3", dict(rope_parameters=dict(rope_type="linear", factor=2.0) | THETA)),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen3_moe": ("qwen3_moe", MOE | dict(norm_topk_prob=True)),
    "qwen3_moe, plain softmax": ("qwen3_moe", MOE | dict(norm_topk_prob=False)),
}


def make_hf(case: str, folder: Path, *, plain_rope: bool = False) -> Path:
    """A random model of the case, with every weight away from its initial value, saved by transformers."""
    kind, fields = CASES[case]
    torch.manual_seed(0)
    fields = COMMON | fields
    if plain_rope:
        fields.pop("rope_parameters", None)
    dtype = getattr(torch, fields.pop("dtype", "float32"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    model.save_pretrained(folder)
    return folder


def hf_logits(folder: Path) -> torch.Tensor:
    """transformers' logits [T, vocabulary] of TOKENS, fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0]


def run_tool(rank: int, world_size: int, lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and output of tools/convert_checkpoint.py for each command line, in one process."""
    path = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    results = []
    for words in lines:
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            status = tool.main(words)
        results.append((status, output.getvalue()))
    return results


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """For each case the original, the imported and the exported folder, by the two commands with --verify."""
    root = tmp_path_factory.mktemp("converted")
    folders, lines = {}, []
    for number, case in enumerate(CASES):
        hf = make_hf(case, root / f"hf{number}")
        megatron, back = root / f"megatron{number}", root / f"back{number}"
        folders[case] = (hf, megatron, back)
        lines += [["import", "--hf", str(hf), "--out", str(megatron), "--verify"],
                  ["export", "--megatron", str(megatron), "--out", str(back), "--verify"]]  # fmt: skip
    for words, (status, output) in zip(lines, run_ranks(1, run_tool, lines, timeout=170)[0], strict=True):
        assert status == 0, f"{words}: {output}"
        assert re.search(r"[\d.]+ GB in [\d.]+ s, \d+ MB/s", output), output
        difference = re.search(r"largest difference of logits ([\d.e+-]+) on 64 random tokens", output)
        assert difference and float(difference[1]) < 1e-5, output
    return folders


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(case: str, converted: Folders) -> None:
    hf, _, back = converted[case]
    first, second = open_source(hf), open_source(back)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(same_values(rows, second.tensors[name]) for name, rows in first.tensors.items())


@pytest.mark.parametrize("case", CASES)
def test_the_exported_folder_is_the_same_model(case: str, converted: Folders) -> None:
    hf, _, back = converted[case]
    assert torch.equal(hf_logits(back), hf_logits(hf))
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (hf, back))
    after["rope_parameters"].pop("type", None)  # the old spelling beside the new one
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"_name_or_path", "transformers_version"}, changed
    assert json.loads((back / "generation_config.json").read_text()) == json.loads(
        (hf / "generation_config.json").read_text()
    )


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def our_config(checkpoint: Path, **parallel: int) -> Config:
    model, _ = read_checkpoint_model(checkpoint_folder(checkpoint))
    config = tiny_config(seq_length=len(TOKENS), parallel=parallel)
    config.model, config.data.mode = model, "full"
    config.train.global_batch_size = parallel.get("expert", 1)  # a window for each data-parallel rank
    return config


def forward(gpt: Any, tensor: int) -> torch.Tensor:
    """Logits [T, vocabulary] of TOKENS on the last pipeline stage (the hidden state on others)."""
    none, one = np.zeros(len(TOKENS), dtype=bool), np.zeros(1, dtype=np.int64)
    window = Window(TOKENS, np.zeros_like(TOKENS), none, np.array([0, len(TOKENS)]), one, one)
    batch = plan_batch(
        [window], mode="full", placement="document", context_parallel_size=1, context_parallel_rank=0
    ).to(torch.device("cpu"))
    rank = dist.get_rank()
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(len(TOKENS), 1, gpt.config.hidden_size)
        dist.recv(hidden, rank - tensor)
        gpt.set_input_tensor(hidden)
    with torch.no_grad():
        out = gpt(batch.tokens, batch.positions, None, packed_seq_params=PlannedSeqParams(plan=batch.plan))
    if not parallel_state.is_pipeline_last_stage():
        dist.send(out, rank + tensor)
        return out
    return gather_from_tensor_model_parallel_region(out)[0, :, :VOCAB]


def load(checkpoint: str, config: Config) -> Any:
    """The model at this layout with the checkpoint's weights, by Megatron-Core's own loading."""
    gpt = build_model(config)
    folder = checkpoint_folder(Path(checkpoint))
    loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(folder))
    gpt.load_state_dict(loaded["model"])
    return gpt


def logits_on_rank(rank: int, world_size: int, jobs: list[tuple[str, Config]]) -> list[torch.Tensor]:
    """Logits of each checkpoint at this layout (the hidden state before the last stage)."""
    initialize_ranks(jobs[0][1])
    return [forward(load(checkpoint, config), config.parallel.tensor) for checkpoint, config in jobs]


LAYOUTS = [
    (1, {}, list(CASES)),
    (2, dict(tensor=2), ["llama", "llama tied, llama3", "qwen2 tied", "qwen3, linear", "phi3"]),
    (2, dict(pipeline=2), ["llama tied, llama3", "mistral, yarn", "qwen3_moe"]),
]


@pytest.mark.parametrize(("world_size", "parallel", "cases"), LAYOUTS, ids=lambda value: str(value)[:20])
def test_an_imported_checkpoint_computes_what_transformers_does(
    world_size: int, parallel: dict[str, int], cases: list[str], converted: Folders
) -> None:
    jobs = [(str(converted[case][1]), our_config(converted[case][1], **parallel)) for case in cases]
    per_rank = run_ranks(world_size, logits_on_rank, jobs)
    for case, found in zip(cases, per_rank[-1], strict=True):
        torch.testing.assert_close(found, hf_logits(converted[case][0]), atol=1e-5, rtol=1e-5, msg=case)


def experts_on_rank(rank: int, world_size: int, checkpoint: str, config: Config) -> dict[str, torch.Tensor]:
    """The weights of this rank's experts, as loaded."""
    initialize_ranks(config)
    state = load(checkpoint, config).state_dict()
    return {name: value for name, value in state.items() if ".experts." in name and value is not None}


def test_expert_parallel_ranks_load_their_own_experts(converted: Folders) -> None:
    hf, megatron, _ = converted["mixtral"]
    tensors = open_source(hf).tensors
    per_rank = run_ranks(2, experts_on_rank, str(megatron), our_config(megatron, expert=2))
    for expert in range(4):
        for layer in range(2):
            theirs = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            w1, w2, w3 = (tensors[f"{theirs}w{i}.weight"] for i in (1, 2, 3))
            ours = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert % 2}."
            found = per_rank[expert // 2]
            assert torch.equal(found[ours + "linear_fc1.weight"], torch.cat([w1.read(0, 72), w3.read(0, 72)]))
            assert torch.equal(found[ours + "linear_fc2.weight"], w2.read(0, 48))
