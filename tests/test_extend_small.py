"""A model's context extended from end to end: the example, and the evaluation's command on what it made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example wrote; it must have succeeded, which takes transformers' agreement."""
    folder = tmp_path_factory.mktemp("extended") / "toy"
    done = run("examples/extend_small/run.py", "--output", folder, "--steps", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers: same choices True" in done.stdout
    return folder


@pytest.mark.slow
def test_the_example_extends_a_model_and_transformers_agrees(toy: Path) -> None:
    config = json.loads((toy / "extended" / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert (config.get("rope_parameters") or config)["rope_theta"] == 1e6
    before, extended = json.loads((toy / "results" / "results.json").read_text())
    assert extended["figures"]["short_loss"] < before["figures"]["short_loss"] - 0.2
    assert extended["by_position"]["whole"][-1] < before["by_position"]["whole"][-1] - 0.2


@pytest.mark.slow
def test_the_command_judges_a_checkpoint_and_a_hugging_face_folder_alike_on_two_ranks(
    toy: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.md").write_text((ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text())
    done = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/evaluate_long.py",
        f"trained={toy / 'run'}", f"exported={toy / 'extended'}", "--text", text, "--documents", text,
        "--lengths", "700", "1k", "--window", "128", "--samples", "1", "--depths", "2", "--greedy",
        "--tasks", "single", "multi_query", "--output", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    trained, exported = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [one["depth"] for one in trained["needles"] if one["task"] == "single"] == [0.0, 1.0] * 2
    for one, other in zip(trained["needles"], exported["needles"], strict=True):
        assert one["wrote"] == other["wrote"]
        assert one["log_probability"] == pytest.approx(other["log_probability"], abs=1e-4)
    assert trained["figures"]["short_loss"] == pytest.approx(exported["figures"]["short_loss"], abs=1e-5)


@pytest.mark.slow
def test_the_experiment_runs_and_its_tables_are_drawn(toy: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "held_out").mkdir(parents=True)
    for suffix in ("bin", "idx", "json"):
        shutil.copy(toy / f"data.{suffix}", data / f"train.{suffix}")
    summary = json.loads((data / "train.json").read_text())
    shutil.copytree(toy / summary["tokenizer"], data / "train_tokenizer")
    (data / "train.json").write_text(json.dumps(summary | {"tokenizer": "train_tokenizer"}))
    text = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    (data / "held_out" / "a.txt").write_text(text)
    done = run(
        "examples/extend_small/experiment.py", "--data", data, "--size", "cpu", "--pretrain-seconds", "1.5",
        "--extend-seconds", "0.5", "--modes", "anchor", "--lengths", "1536", "--window", "256", "--samples",
        "1", "--long-documents", "1", "--speed-lengths", "--output", tmp_path / "seed1.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "seed1.json").read_text())
    losses = found["extend anchor"]["losses"]
    assert found["finished"] and losses[0] < found["pretrain"]["losses"][0]  # it went on from the base
    done = run(
        "examples/extend_small/summarise.py", tmp_path / "seed1.json", "--output", tmp_path / "pictures"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| anchor | " in done.stdout and (tmp_path / "pictures" / "needles.png").is_file()


@pytest.mark.slow
def test_what_cannot_be_judged_ends_in_one_message(tmp_path: Path) -> None:
    done = run("tools/evaluate_long.py", tmp_path, "--text", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"evaluate_long.py: {tmp_path}: expected a checkpoint")
    )
