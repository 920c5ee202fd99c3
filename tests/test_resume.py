"""A run that was stopped or killed goes on as if it had not been: bit for bit on its own layout, within 1e-5
on another.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import read_whole

from anchor_megatron.config import Config
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.testing.ranks import RankError, run_ranks
from anchor_megatron.testing.texts import write_paragraphs
from anchor_megatron.training.loop import Run
from anchor_megatron.training.optimizer import create_optimizer_state

STEPS, MIDDLE = 10, 5

# layout: (fields of `parallel`, number of ranks)
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": (dict(), 1),
    "CP 2": (dict(context=2), 2),
    "DP 2": (dict(), 2),
    "TP 2, sequence": (dict(tensor=2, sequence=True), 2),
    "PP 2": (dict(pipeline=2), 2),
    "TP 2, CP 2": (dict(tensor=2, context=2), 4),
    "DP 2, CP 2": (dict(context=2), 4),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real text: the standard library's json package, a paragraph a document."""
    prefix = tmp_path_factory.mktemp("data") / "set"
    text = write_paragraphs(prefix.with_suffix(".jsonl"))
    preprocess(Job((text,), prefix, train_tokenizer=300))
    return prefix


Straight = Callable[..., Config]


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Runs of STEPS steps in one go that save on the way, each made once."""
    made: dict[str, Config] = {}

    def run(layout: str, **sections: dict[str, Any]) -> Config:
        key = f"{layout} {sections}"
        if key not in made:
            folder = tmp_path_factory.mktemp("straight")
            config = configuration(data, folder, layout, **sections)
            train(config, layout)
            assert list(losses(config)) == list(range(1, STEPS + 1))
            made[key] = config
        return made[key]

    return run


def configuration(prefix: Path, folder: Path, layout: str, **sections: dict[str, Any]) -> Config:
    """A run on the data set `prefix` that saves and reports into `folder`."""
    given: dict[str, dict[str, Any]] = dict(
        parallel=LAYOUTS[layout][0],
        data=dict(train=str(prefix), seq_length=128, num_workers=0),
        train=dict(steps=STEPS, global_batch_size=2, precision="fp32"),
        optimizer=dict(lr=1e-3, warmup_steps=3, decay="cosine"),
        checkpoint=dict(directory=str(folder), save_interval=MIDDLE),
        log=dict(jsonl=str(folder / "metrics.jsonl"), peak_tflops=1.0),
    )
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return tiny_config(vocab_size=300, **given)


def train_on_rank(rank: int, world_size: int, config: Config) -> None:
    Run(config).train()


def train(config: Config, layout: str) -> None:
    run_ranks(LAYOUTS[layout][1], train_on_rank, config)


def reports(config: Config) -> dict[int, dict[str, Any]]:
    """What was reported, by step; where a step was taken twice, the later time."""
    assert config.log.jsonl is not None
    lines = Path(config.log.jsonl).read_text().splitlines()
    return {report["step"]: report for report in map(json.loads, lines)}


def losses(config: Config) -> dict[int, float]:
    return {step: report["loss"] for step, report in reports(config).items()}


def checkpoint(config: Config, step: int) -> Path:
    return Path(f"{config.checkpoint.directory}/step_{step:07d}")


def weights(config: Config, step: int) -> dict[str, torch.Tensor]:
    """The whole model that the run saved after `step`, whatever its layout."""
    whole = tiny_config(vocab_size=300, model=vars(config.model), train=vars(config.train))
    return run_ranks(1, read_whole, whole, str(checkpoint(config, step)))[0]


def resume_in(folder: Path, config: Config, layout: str, **sections: dict[str, Any]) -> Config:
    """Goes on from the middle of `config`'s run, in `folder` and on `layout`."""
    folder.mkdir()
    shutil.copytree(checkpoint(config, MIDDLE), folder / checkpoint(config, MIDDLE).name)
    resumed = configuration(Path(config.data.train), folder, layout, **sections)
    train(resumed, layout)
    assert list(losses(resumed)) == list(range(MIDDLE + 1, resumed.train.steps + 1))
    return resumed


def assert_same_run(found: Config, expected: Config) -> None:
    """Losses and last weights, bit for bit."""
    wanted = losses(expected)
    assert losses(found) == {step: wanted[step] for step in losses(found)}
    ours, theirs = weights(found, STEPS), weights(expected, STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), f"{name}: off by up to {(ours[name] - value).abs().max()}"


@pytest.mark.parametrize("layout", ["one rank", "CP 2", "TP 2, sequence", "PP 2", "DP 2, CP 2"])
def test_a_resumed_run_is_the_same_bit_for_bit(layout: str, straight: Straight, tmp_path: Path) -> None:
    expected = straight(layout)
    assert_same_run(resume_in(tmp_path / "resumed", expected, layout), expected)


def test_half_precision_resumes_bit_for_bit(straight: Straight, tmp_path: Path) -> None:
    sections = dict(train=dict(precision="bf16", global_batch_size=1), data=dict(seq_length=16))
    expected = straight("CP 2", **sections)
    assert_same_run(resume_in(tmp_path / "resumed", expected, "CP 2", **sections), expected)


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        ("CP 2", "one rank"),
        ("CP 2", "DP 2"),
        ("CP 2", "TP 2, sequence"),
        ("CP 2", "TP 2, CP 2"),
        ("TP 2, sequence", "PP 2"),
        ("PP 2", "CP 2"),
        ("DP 2, CP 2", "one rank"),
    ],
)
def test_another_layout_goes_on_within_rounding(
    saved_on: str, resumed_on: str, straight: Straight, tmp_path: Path
) -> None:
    expected = straight(saved_on)
    found = resume_in(tmp_path / "resumed", expected, resumed_on)
    wanted = losses(expected)
    for step, loss in losses(found).items():
        assert loss == pytest.approx(wanted[step], abs=1e-5, rel=0), f"step {step}"
    ours, theirs = weights(found, STEPS), weights(expected, STEPS)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-5, name


@pytest.mark.parametrize(("saved", "resumed"), [(128, 100), (100, 128)])
def test_another_padding_of_the_vocabulary_goes_on(
    saved: int, resumed: int, straight: Straight, tmp_path: Path
) -> None:
    """300 entries are padded to 384 or not at all, as a tensor-parallel size may ask."""
    expected = straight("one rank", model=dict(make_vocab_size_divisible_by=saved))
    sections = dict(model=dict(make_vocab_size_divisible_by=resumed))
    wanted = losses(expected)
    for step, loss in losses(resume_in(tmp_path / "resumed", expected, "one rank", **sections)).items():
        assert loss == pytest.approx(wanted[step], abs=1e-5, rel=0), f"step {step}"


def train_and_die(rank: int, world_size: int, config: Config, reached: Path) -> None:
    """Trains until the folder `reached` is there: then every rank is killed, as by a machine that fails."""

    def die() -> None:
        while not reached.exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()
    Run(config).train()


def test_a_killed_run_resumes_bit_for_bit(straight: Straight, data: Path, tmp_path: Path) -> None:
    config = configuration(data, tmp_path / "killed", "CP 2", data=dict(num_workers=1))
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(2, train_and_die, config, checkpoint(config, MIDDLE))
    assert not checkpoint(config, STEPS).exists(), "it was to be killed between two checkpoints"
    half_written = tmp_path / "killed" / f"step_{STEPS:07d}.partial"
    half_written.mkdir(exist_ok=True)
    (half_written / "__0_0.distcp").write_bytes(b"half of it")
    before = len(reports(config))
    train(config, "CP 2")
    steps = [json.loads(line)["step"] for line in Path(str(config.log.jsonl)).read_text().splitlines()]
    assert before >= MIDDLE and steps[before:] == list(range(MIDDLE + 1, STEPS + 1))
    assert not half_written.exists()
    assert_same_run(config, straight("CP 2"))


def test_the_configuration_wins_over_the_checkpoint(straight: Straight, tmp_path: Path) -> None:
    changed = dict(lr=2e-3, warmup_steps=0, decay="linear")
    sections = dict(optimizer=changed, train=dict(steps=8))
    found = reports(resume_in(tmp_path / "resumed", straight("one rank"), "one rank", **sections))
    rates = {step: report["learning_rate"] for step, report in found.items()}
    assert rates == pytest.approx({step: 2e-3 * (1 - (step - 1) / 8) for step in (6, 7, 8)})


def start_on_rank(rank: int, world_size: int, config: Config) -> tuple[int, float, dict[str, torch.Tensor]]:
    """Before a first step: the steps taken, the sum of Adam's moments; after it: the weights."""
    run = Run(config)
    create_optimizer_state(run.trainee.optimizer)
    parts = getattr(run.trainee.optimizer, "chained_optimizers", [run.trainee.optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    moments = sum(float(state["exp_avg"].abs().sum() + state["exp_avg_sq"].sum()) for state in states)
    run.train()
    return run.first_step, moments, run.trainee.gpt.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pretrained_weights_start_a_run_of_their_own(
    precision: str, straight: Straight, data: Path, tmp_path: Path
) -> None:
    source = straight("one rank")
    config = configuration(
        data, tmp_path, "one rank", train=dict(steps=1, precision=precision),
        checkpoint=dict(pretrained=source.checkpoint.directory, directory=None), optimizer=dict(lr=1e-9),
    )  # fmt: skip
    (step, moments, found), *_ = run_ranks(1, start_on_rank, config)
    assert (step, moments) == (0, 0.0)
    for name, value in weights(source, STEPS).items():
        expected = value.to(found[name].dtype)
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-7 if precision == "fp32" else 0), name


def message_on_rank(rank: int, world_size: int, config: Config) -> str:
    with pytest.raises(ValueError) as caught:
        Run(config)
    return str(caught.value)


@pytest.mark.parametrize("role", ["directory", "pretrained"])
@pytest.mark.parametrize(
    "model",
    [dict(hidden_size=128), dict(num_layers=1), dict(qk_layernorm=True), dict(tie_embeddings=True),
     dict(num_attention_heads=8, num_query_groups=4, kv_channels=8)],
    ids=lambda model: next(iter(model)),
)  # fmt: skip
def test_another_models_checkpoint_is_refused(
    role: str, model: dict[str, Any], straight: Straight, data: Path, tmp_path: Path
) -> None:
    folder = straight("one rank").checkpoint.directory
    given = dict(directory=folder) if role == "directory" else dict(directory=None, pretrained=folder)
    config = configuration(data, tmp_path, "one rank", model=model, checkpoint=given)
    (message,) = run_ranks(1, message_on_rank, config)
    assert f"{folder}/step_{STEPS:07d}" in message
    assert f"model.{next(iter(model))}: got" in message


def test_a_tensor_of_another_shape_is_named(straight: Straight, data: Path, tmp_path: Path) -> None:
    source = straight("one rank")
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint(source, STEPS), folder)
    (folder / "config.yaml").unlink()
    (folder / "manifest.json").unlink()
    given = dict(directory=None, pretrained=str(folder))
    for model, expected in (
        (dict(ffn_hidden_size=96), "decoder.layers.mlp.linear_fc1.weight: got shape (2, 384, 64), expected"),
        (dict(add_qkv_bias=True), "decoder.layers.self_attention.linear_qkv.bias: got no such tensor"),
    ):
        config = configuration(data, tmp_path, "one rank", model=model, checkpoint=given)
        (message,) = run_ranks(1, message_on_rank, config)
        assert message.startswith(f"{folder}: {expected}")
