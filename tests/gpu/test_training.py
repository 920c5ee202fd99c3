"""`pretrain_anchor.py` on two GPUs sharing each window: saves, resumes, exports; FP8 beside BF16."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from anchor_megatron.data.preprocess import Job, preprocess

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(400),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file that trains a small model on the standard library's json package."""
    folder = tmp_path_factory.mktemp("run")
    preprocess(
        Job(
            (Path(sysconfig.get_paths()["stdlib"]) / "json",),
            folder / "set",
            suffixes=(".py",),
            train_tokenizer=300,
        )
    )
    sections = dict(
        model=dict(hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2),
        data=dict(train=str(folder / "set"), seq_length=1024, num_workers=1),
        parallel=dict(context=2),
        train=dict(steps=6, global_batch_size=2),
        optimizer=dict(lr=3e-4),
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"


def pretrain(run_file: Path, metrics: Path, *overrides: str) -> list[dict[str, Any]]:
    """The reports of a run on two ranks that has to succeed within two minutes."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    words = [str(ROOT / "pretrain_anchor.py"), str(run_file), f"log.jsonl={metrics}", *overrides]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_a_run_resumes_where_it_was_saved_and_its_model_leaves(run_file: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved = [f"checkpoint.directory={checkpoints}", "checkpoint.save_interval=3"]
    whole = pretrain(run_file, tmp_path / "whole.jsonl", *saved)
    shutil.rmtree(checkpoints / "step_0000006")
    (checkpoints / "latest").write_text("step_0000003\n")
    rest = pretrain(run_file, tmp_path / "rest.jsonl", *saved)
    assert [line["step"] for line in rest] == [4, 5, 6]
    for one, other in zip(rest, whole[3:], strict=True):  # flash-attn's backward pass adds in no fixed order
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3), one["step"]
    export = [str(ROOT / "tools" / "convert_checkpoint.py"), "export", "--verify"]
    folders = ["--megatron", str(checkpoints), "--out", str(tmp_path / "hf")]
    done = subprocess.run([sys.executable, *export, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_fp8_learns_what_bf16_does(run_file: Path, tmp_path: Path) -> None:
    bf16, fp8 = (
        pretrain(run_file, tmp_path / f"{kind}.jsonl", f"train.fp8={kind}") for kind in ("null", "hybrid")
    )
    assert [line["loss"] for line in fp8] != [line["loss"] for line in bf16], (
        "FP8 changed nothing: it was not used"
    )
    for one, other in zip(fp8, bf16, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02), one["step"]


def test_experts_learn_in_fp8(run_file: Path, tmp_path: Path) -> None:
    """Their numbers of tokens are no multiples of what FP8 products take, until they are padded."""
    lines = pretrain(run_file, tmp_path / "experts.jsonl", "train.fp8=hybrid", "model.num_experts=4")
    assert lines[-1]["loss"] < lines[0]["loss"]
