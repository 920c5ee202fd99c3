"""`pretrain_anchor.py` end to end: what it refuses and how, what it reports, that what it trains learns."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain_anchor
from anchor_megatron.config import Config
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.testing.models import random_window, tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.testing.texts import write_paragraphs
from anchor_megatron.training.batch import plan_batch
from anchor_megatron.training.setup import initialize_ranks
from anchor_megatron.training.step import build_trainee, forward_backward

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "step", "loss", "grad_norm", "learning_rate", "seconds_per_step", "tokens_per_second", "tflops_per_rank",
    "mfu", "loss_tokens", "tokens", "documents", "padding_tokens", "balance", "received_tokens_per_rank",
    "skipped_steps", "cut_documents", "joined_documents", "dropped_documents", "tag_tokens", "batch_balance",
    "data_wait_ms", "forward_seconds_median", "forward_seconds_slowest", "slowest_rank", "total_skipped",
    "total_restarts", "total_failed_saves", "total_rewinds", "total_skipped_batches",
}  # fmt: skip


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real text: the standard library's json package, a paragraph a document."""
    output = tmp_path_factory.mktemp("data") / "set"
    text = write_paragraphs(output.with_suffix(".jsonl"))
    preprocess(Job((text,), output, train_tokenizer=300))
    return output


@pytest.fixture
def run_file(prefix: Path, tmp_path: Path) -> Path:
    """A YAML file that trains the tiny model on the data set."""
    sections: dict[str, Any] = dict(
        data=dict(train=str(prefix), seq_length=128, num_workers=0),
        train=dict(steps=2, global_batch_size=4, precision="fp32"),
        optimizer=dict(lr=3e-3),
        log=dict(jsonl=str(tmp_path / "metrics.jsonl"), peak_tflops=1.0),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "run.yaml"


def main_on_rank(rank: int, world_size: int, words: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    sys.argv = ["pretrain_anchor.py", *words]
    with contextlib.redirect_stderr(errors):
        return pretrain_anchor.main(), errors.getvalue()


def pretrain(world_size: int, run_file: Path, *overrides: str) -> list[dict[str, Any]]:
    """The reports of a run that has to succeed."""
    metrics = run_file.parent / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    for status, errors in run_ranks(world_size, main_on_rank, [str(run_file), *overrides]):
        assert status == 0, errors
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain_anchor.py"), *words], capture_output=True, text=True, cwd=ROOT
    )


def test_help_explains_every_field() -> None:
    done = command("--help")
    assert done.returncode == 0, done.stderr
    defaults = Config()
    for section in dataclasses.fields(Config):
        for entry in dataclasses.fields(getattr(defaults, section.name)):
            assert f"\n  {section.name}.{entry.name} (" in done.stdout


def test_the_process_ends_with_2_and_one_message(run_file: Path) -> None:
    done = command(str(run_file), "train.step=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pretrain_anchor.py: configuration ") and done.stderr.count("\n") == 1


def truncated(prefix: Path, folder: Path) -> Path:
    """A copy of the data set whose .bin lacks its last token."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{suffix}", folder / f"cut{suffix}")
    whole = (folder / "cut.bin").read_bytes()
    (folder / "cut.bin").write_bytes(whole[:-2])
    return folder / "cut"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "train.step: Key 'step' not in 'TrainConfig'"),
        ("train.steps=many", "train.steps: Value 'many'"),
        ("data.train=gone/set", "data.train: gone/set.bin: no such file"),
        ("data.train={cut}", "cut.bin: got"),
        (
            "model.vocab_size=200",
            "set.bin: got token id 299, expected ids below",
        ),
        ("data.anchor_token=300", "data.anchor_token: got 300, expected an id below vocab_size = 300"),
        (
            "data.end_label=eos data.eos_token=300",
            "data.eos_token: got 300, expected an id below vocab_size = 300",
        ),
        ("data.min_document_tokens=9999", "data.min_document_tokens: got 9999, expected at most"),
        (
            "data.split=[0.999,0.001,0.0] train.eval_interval=1",
            "data.split: got no documents of",
        ),
        ("data.seq_length=1", "data.seq_length: got 1, expected at least 2"),
        ("parallel.context=3", "got 128, expected a multiple of parallel.context = 3"),
        ("parallel.context=2", "number of ranks: got 1, expected a multiple of"),
        ("model.num_experts=4 parallel.tensor=2", "parallel.sequence: got false, expected true for experts"),
        ("train.micro_batch_size=3", "train.global_batch_size: got 4, expected a multiple of"),
        ("attention.kernel=abacus", "attention.kernel: got 'abacus', expected one of"),
        ("log.precision_layers=[2]", "log.precision_layers: got 2, expected layers from 0 to 1"),
        ("checkpoint.pretrained=gone", "checkpoint.pretrained: got gone, expected a checkpoint"),
    ],
)
def test_bad_input_ends_before_training(
    override: str, message: str, prefix: Path, run_file: Path, tmp_path: Path
) -> None:
    if "{cut}" in override:
        override = override.format(cut=truncated(prefix, tmp_path))
    words = [str(run_file), "model.vocab_size=300", *override.split()]
    ((status, errors),) = run_ranks(1, main_on_rank, words)
    told = [line for line in errors.splitlines() if not line.startswith("attention kernel ")]
    assert status == 2 and len(told) == 1 and message in told[0], errors
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_configuration_that_is_none_is_named(tmp_path: Path) -> None:
    ((status, errors),) = run_ranks(1, main_on_rank, [str(tmp_path / "gone.yaml")])
    assert (status, errors) == (2, f"pretrain_anchor.py: configuration {tmp_path / 'gone.yaml'}: expected a "
                                   "YAML file, got none there\n")  # fmt: skip
    (tmp_path / "broken.yaml").write_text("model: {num_layers: 2\n")
    ((status, errors),) = run_ranks(1, main_on_rank, [str(tmp_path / "broken.yaml")])
    assert status == 2 and "broken.yaml" in errors and "Traceback" not in errors


def test_twenty_steps_learn_and_are_reported(run_file: Path, tmp_path: Path) -> None:
    board, metrics = tmp_path / "board", tmp_path / "node" / "run.prom"
    found = pretrain(
        2, run_file, "parallel.context=2", "train.steps=20", f"log.tensorboard={board}",
        f"log.prometheus={metrics}",
    )  # fmt: skip
    assert [report["step"] for report in found] == list(range(1, 21))
    assert all(set(report) == FIGURES for report in found)
    losses = [report["loss"] for report in found]
    assert losses[0] == pytest.approx(5.7, abs=0.1)  # log(300)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.8
    for report in found:
        assert report["tokens"] + report["documents"] + report["padding_tokens"] == 4 * 128
        assert 0 < report["loss_tokens"] < report["tokens"] + report["documents"]
        assert report["balance"] >= 1 and report["mfu"] == report["tflops_per_rank"] > 0
        assert 0 < report["data_wait_ms"] < 1e3 * report["seconds_per_step"]
        assert report["skipped_steps"] == 0 and report["received_tokens_per_rank"] <= 4 * 64
    events = EventAccumulator(str(board))
    events.Reload()
    assert set(events.Tags()["scalars"]) == FIGURES - {"step"}
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    gauges = {family.name: family for family in text_string_to_metric_families(metrics.read_text())}
    assert {name.removeprefix("anchor_megatron_") for name in gauges} == FIGURES
    assert gauges["anchor_megatron_loss"].samples[0].value == losses[-1]


def test_reports_over_an_interval_sum_up_its_steps(run_file: Path) -> None:
    each = pretrain(1, run_file, "train.steps=5")
    some = pretrain(1, run_file, "train.steps=5", "log.interval=2")
    assert [report["step"] for report in some] == [2, 4, 5]
    assert some[0]["tokens"] == each[0]["tokens"] + each[1]["tokens"]
    weighed = [report["loss"] * report["loss_tokens"] for report in each[:2]]
    assert some[0]["loss"] == pytest.approx(sum(weighed) / some[0]["loss_tokens"], rel=1e-6)


def test_attention_is_watched_without_a_trace_in_training(run_file: Path) -> None:
    plain = pretrain(1, run_file, "train.steps=4")
    words = ["log.precision_interval=2", "log.precision_layers=[1]", "train.recompute=selective"]
    found = pretrain(1, run_file, "train.steps=4", *words)
    watched = {f"precision/layer_1/{name}" for name in ("anchor_share", "largest_logit", "shift_difference")}
    assert [set(report) - FIGURES for report in found] == [set(), watched, set(), watched]
    assert [report["loss"] for report in found] == [report["loss"] for report in plain]


def test_every_mode_trains_and_is_its_own(run_file: Path) -> None:
    found = {}
    # weights as small as usual make attention so flat that other positions do not change a bit
    words = ("model.init_std=0.3", "parallel.context=2")
    for mode in ("full", "document", "document_reset", "anchor"):
        found[mode] = pretrain(2, run_file, f"data.mode={mode}", *words)
    gradients = {mode: tuple(report["grad_norm"] for report in reports) for mode, reports in found.items()}
    assert len(set(gradients.values())) == 4, f"modes that do not differ: {gradients}"
    one = pretrain(1, run_file, "data.num_workers=1", words[0])
    for expected, report in zip(one, found["anchor"], strict=True):
        assert report["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_two_windows_at_once_are_the_same_step(run_file: Path) -> None:
    """Windows of a micro-batch do not see each other, in `full` either."""
    for mode in ("anchor", "full"):
        words = (f"data.mode={mode}", "parallel.context=2")
        single = pretrain(2, run_file, *words)
        double = pretrain(2, run_file, *words, "train.micro_batch_size=2")
        for one, two in zip(single, double, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


EXPERTS = ("model.num_experts=4", "model.moe_aux_loss_coeff=0.01")


def test_experts_train_alike_on_every_layout(run_file: Path, tmp_path: Path) -> None:
    pretrain(1, run_file, *EXPERTS, "train.steps=1", f"checkpoint.directory={tmp_path / 'first'}")
    weights = f"checkpoint.pretrained={tmp_path / 'first'}"  # as fresh ones differ from layout to layout
    one = pretrain(1, run_file, *EXPERTS, weights)
    for layout in (
        ["parallel.context=2"],
        ["parallel.context=2", "parallel.expert=2"],
        ["parallel.expert=2"],
    ):
        other = pretrain(2, run_file, *EXPERTS, weights, *layout)
        for expected, report in zip(one, other, strict=True):
            assert report["loss"] == pytest.approx(expected["loss"], abs=1e-5), layout
            assert report["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), layout


LENGTHS = [9, 2, 31, 1, 1, 20]


def balancing_on_rank(rank: int, world_size: int, anchors_count: bool) -> tuple[torch.Tensor, float]:
    """Router probabilities [rows, experts] that belong in the statistics, first layer; the layer's balancing
    loss.
    """
    config = tiny_config(
        model=dict(num_experts=4, num_layers=1, moe_aux_loss_coeff=0.01), parallel=dict(context=world_size)
    )
    initialize_ranks(config)
    trainee = build_trainee(config)
    window = random_window(lengths=LENGTHS, vocab_size=90, seed=0)
    batch = plan_batch(
        [window], mode="anchor", placement="document", context_parallel_size=world_size,
        context_parallel_rank=rank,
    )  # fmt: skip
    kept: list[torch.Tensor] = []
    (router,) = [module for module in trainee.gpt.modules() if isinstance(module, TopKRouter)]
    router.register_forward_hook(lambda module, given, out: kept.append(module.gating(given[0])))
    get_moe_layer_wise_logging_tracker().clear()
    forward_backward(config, trainee.model, iter([batch]))
    counted = torch.ones(64 // world_size, dtype=torch.bool)
    counted[batch.to(torch.device("cpu")).anchors[0]] = anchors_count
    balancing = get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"]
    return kept[0].detach().reshape(-1, 4).softmax(dim=1)[counted], float(balancing[0])


def balancing(world_size: int, *, anchors_count: bool) -> tuple[float, float]:
    """The balancing loss as the router found it, and by its definition (arXiv 2101.03961, equation 4)."""
    answers = run_ranks(world_size, balancing_on_rank, anchors_count)
    probabilities = torch.cat([answer[0] for answer in answers])
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
    defined = 4 * (chosen.mean(dim=0) / 2 * probabilities.mean(dim=0)).sum()
    return sum(answer[1] for answer in answers), float(defined)


@pytest.mark.parametrize("world_size", [1, 2])
def test_anchors_are_kept_out_of_the_routers_statistics(world_size: int) -> None:
    found, expected = balancing(world_size, anchors_count=False)
    assert found == pytest.approx(expected, rel=1e-6)
    found, other = balancing(world_size, anchors_count=True)
    assert abs(other - found) > 1e-5 * found, "the copies of the anchor would make no difference here"
