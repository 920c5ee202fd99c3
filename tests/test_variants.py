"""Data variants, all at once: they train, are counted, and are one run on any layout and after resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_inspect_data import paragraphs

from anchor_megatron.config import Config
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.loop import Run

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paragraphs(tmp_path_factory.mktemp("data") / "set")


def configuration(prefix: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    given: dict[str, dict[str, Any]] = dict(
        data=dict(
            train=[dict(prefix=str(prefix), weight=2.0), dict(prefix=str(prefix), weight=1.0)],
            split=[0.8, 0.1, 0.1], seq_length=384, num_workers=0, sampler="upsample_long", long_tokens=200,
            long_weight=2.0, domain_tag=True, interleave=8, end_label="eos", min_document_tokens=50,
            short_documents="join", max_documents=5, packing="balanced", packing_lookahead=2,
        ),
        train=dict(
            steps=STEPS, global_batch_size=4, precision="fp32", eval_interval=2, eval_steps=2,
        ),
        optimizer=dict(lr=1e-3),
        checkpoint=dict(directory=str(folder), save_interval=2),
        log=dict(jsonl=str(folder / "metrics.jsonl"), peak_tflops=1.0, interval=1),
    )  # fmt: skip
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return tiny_config(vocab_size=300, **given)


def train_on_rank(rank: int, world_size: int, config: Config) -> None:
    Run(config).train()


def train(config: Config, world_size: int) -> list[dict[str, Any]]:
    run_ranks(world_size, train_on_rank, config)
    assert config.log.jsonl is not None
    return [json.loads(line) for line in Path(config.log.jsonl).read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(configuration(data, folder), 1)


def test_everything_at_once_trains_and_is_counted(
    straight: tuple[Path, list[dict[str, Any]]],
) -> None:
    found = straight[1]
    assert [report["step"] for report in found] == list(range(1, STEPS + 1))
    assert [("valid_loss" in report, "test_loss" in report) for report in found] == [
        (False, False), (True, False), (False, False), (True, True),
    ]  # fmt: skip
    assert found[3]["valid_loss"] < found[1]["valid_loss"] < 6 and found[3]["test_loss"] < 6
    for report in found:
        parts = ("tokens", "documents", "tag_tokens", "padding_tokens")
        assert sum(report[name] for name in parts) == 4 * 384
        assert report["tag_tokens"] > report["documents"] and report["documents"] <= 4 * 5
        assert report["batch_balance"] >= 1
    assert sum(report["joined_documents"] for report in found) > 0


def test_held_out_losses_leave_the_run_as_it_is(
    data: Path, straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    found = train(configuration(data, tmp_path, train=dict(eval_interval=0)), 1)
    for report, wanted in zip(found, straight[1], strict=True):
        assert "valid_loss" not in report
        assert (report["loss"], report["grad_norm"]) == (wanted["loss"], wanted["grad_norm"])
        assert report.get("test_loss") == wanted.get("test_loss")


@pytest.mark.parametrize(
    ("parallel", "micro_batch_size"), [(dict(context=2, tensor=2, sequence=True), 1), (dict(pipeline=2), 2)]
)
def test_variants_are_the_same_run_on_every_layout_and_after_resuming(
    data: Path,
    straight: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    parallel: dict[str, int],
    micro_batch_size: int,
) -> None:
    """Goes on from the middle of the straight run, on four ranks."""
    folder, expected = straight
    shutil.copytree(folder / "step_0000002", tmp_path / "step_0000002")
    (tmp_path / "latest").write_text("step_0000002\n")
    sections = dict(
        parallel=parallel, data=dict(num_workers=1), train=dict(micro_batch_size=micro_batch_size)
    )
    found = train(configuration(data, tmp_path, **sections), 4)
    assert [report["step"] for report in found] == [3, 4]
    for report, wanted in zip(found, expected[2:], strict=True):
        for name in ("loss", "valid_loss", "test_loss"):
            if name in wanted:
                assert report[name] == pytest.approx(wanted[name], abs=1e-5), name
        for name in ("tokens", "documents", "cut_documents", "joined_documents", "tag_tokens", "loss_tokens"):
            assert report[name] == wanted[name], name
