"""The estimate against measured passes and published sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from anchor_megatron.config import Config, load_config, model_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import estimate as tool  # noqa: E402

CONFIGS = sorted((ROOT / "examples" / "extend_128k").glob("*.yaml"))


def measured(ranks: int) -> tuple[Config, dict[str, float]]:
    """The measured pass of four layers on so many GPUs, and its configuration."""
    kept = json.loads(
        (ROOT / "benchmarks" / "results" / {1: "step_1gpu.json", 2: "step_cp2.json"}[ranks]).read_text()
    )
    config = Config(model=model_config({"preset": kept["preset"], "num_layers": kept["layers"]}))
    config.data.train, config.data.seq_length = "unused", kept["tokens"]
    config.parallel.context = ranks
    return config, next(row for row in kept["rows"] if row["name"] == "ours, anchor")


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_within_a_tenth_of_what_was_measured(ranks: int) -> None:
    config, row = measured(ranks)
    found = tool.estimate(config, ranks=ranks, tflops=500)
    without = found.peak - found.optimizer  # the bench has none
    assert without == pytest.approx(row["peak_gib"], rel=0.1)


def test_one_gpus_rate_tells_two_gpus_time_within_a_tenth() -> None:
    config, row = measured(1)
    tflops = 500 * tool.estimate(config, ranks=1, tflops=500).seconds_per_step / (row["ms"] / 1e3)
    config, row = measured(2)
    found = tool.estimate(config, ranks=2, tflops=tflops)
    assert found.seconds_per_step == pytest.approx(row["ms"] / 1e3, rel=0.1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_fit_on_8_16_and_64_gpus(path: Path) -> None:
    config = load_config(path)
    assert (config.data.seq_length, config.model.rotary_base, config.optimizer.lr) == (131072, 1e7, 2e-5)
    assert config.train.steps == 2000 and config.model.preset == path.stem
    estimates = [tool.estimate(config, ranks=ranks, tflops=450) for ranks in (8, 16, 64)]
    assert all(one.tokens_per_step == 1 << 20 and one.peak < 75 for one in estimates)  # of an 80 GB GPU
    assert estimates[0].peak > estimates[1].peak > estimates[2].peak
    assert estimates[0].hours == pytest.approx(8 * estimates[2].hours)


def test_the_weights_are_the_published_models(tmp_path: Path) -> None:
    config = load_config(ROOT / "examples" / "extend_128k" / "llama-3-8b.yaml")
    found = tool.estimate(config, ranks=8, tflops=450)
    assert found.weights * tool.GIB / 2 == pytest.approx(8.03e9, rel=2e-3)


def test_what_cannot_run_ends_in_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [str(CONFIGS[0]), "--ranks", "8", "train.recompute=none", "--json", str(tmp_path / "found.json")]
    assert tool.main(words) == 0
    assert "peak" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["tokens_per_step"] == 1 << 20
    assert tool.main([str(CONFIGS[0]), "--ranks", "12"]) == 2
    assert "number of ranks: got 12" in capsys.readouterr().err
