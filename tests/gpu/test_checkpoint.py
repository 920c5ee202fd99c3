"""A checkpoint on GPUs: written while the steps go on, and gone on from."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import scenes

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Megatron-Core resumes on a GPU only with TransformerEngine's optimizer or Apex's",
)


def train(folder: Path, *overrides: str) -> str:
    """Trains on as many GPUs as there are, two at most, which share each window; returns what was printed."""
    ranks = min(2, torch.cuda.device_count())
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        str(ROOT / "pretrain_anchor.py"), str(ROOT / "examples" / "gpu.yaml"), f"data.train={folder / 'set'}",
        f"parallel.context={ranks}", "model.num_layers=2", "data.seq_length=2048", "train.steps=6",
        f"checkpoint.directory={folder / 'run'}", "checkpoint.save_interval=2", *overrides,
    ]  # fmt: skip
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=170, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_saves_stops_and_goes_on(tmp_path: Path) -> None:
    scenes.make_data(tmp_path)
    printed = train(tmp_path, "train.stop_after=4")
    assert printed.count("saved ") == 2 and "steps waited" in printed
    printed = train(tmp_path)
    assert f"resumed from {tmp_path / 'run' / 'step_0000004'} after step 4\n" in printed
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["skipped"]) == ("finished", 6, 0)
