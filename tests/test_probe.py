"""`--check`: it passes on every mode and layout that trains, and fails on plans that are wrong."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import pretrain_anchor
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.layout.modes import MODES
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training import batch, probe

ZIGZAG_FULL = ["attention.placement=zigzag", "data.mode=full"]
WORDS = "the anchor stands at position zero and every document sees it".split()


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of a tiny model and a data set of random sentences."""
    folder = tmp_path_factory.mktemp("probe")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, count)) for count in generator.integers(2, 60, 200)]
    (folder / "set.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    preprocess(Job((folder / "set.jsonl",), folder / "set", train_tokenizer=300))
    sections: dict[str, Any] = dict(
        model=dict(init_std=0.1),
        data=dict(train=str(folder / "set"), seq_length=128, num_workers=0),
        train=dict(steps=2, global_batch_size=2, precision="fp32"),
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"


def check_on_rank(rank: int, world_size: int, words: list[str], broken: str | None) -> tuple[int, str]:
    """The program's exit status and what it printed; `broken` names a function of this file that breaks
    it.
    """
    sys.argv = ["pretrain_anchor.py", *words, "--check"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        if broken is not None:
            globals()[broken](patch)
        return pretrain_anchor.main(), printed.getvalue()


def check(run_file: Path, *overrides: str, ranks: int = 1, broken: str | None = None) -> tuple[int, str]:
    found = run_ranks(ranks, check_on_rank, [str(run_file), *overrides], broken)
    assert len({status for status, _ in found}) == 1, "ranks disagree"
    return found[0]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_passes(run_file: Path, mode: str) -> None:
    status, printed = check(run_file, f"data.mode={mode}", "train.micro_batch_size=2")
    assert status == 0 and printed.rstrip().endswith("check passed"), printed
    assert (
        f"at the positions of mode {mode}" in printed and "no row moved that cannot see a change" in printed
    )


@pytest.mark.parametrize(
    "parallel",
    [
        ["parallel.context=2", "train.precision=bf16"],
        ["parallel.context=2", "attention.placement=zigzag"],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
        ["model.num_experts=2", "parallel.expert=2"],
    ],
)
def test_every_layout_passes(run_file: Path, parallel: list[str]) -> None:
    status, printed = check(run_file, *parallel, ranks=2)
    assert status == 0 and "FAILED" not in printed, printed
    assert ("CP 2        equals CP 1 on 128 tokens" in printed) == ("parallel.context=2" in parallel)


def merged_documents(patch: pytest.MonkeyPatch) -> None:
    """Attention runs over document borders."""
    patch.setattr(
        batch,
        "attention_cu_seqlens",
        lambda mode, borders, *, window_length: borders[[0, *range(2, borders.size)]],
    )


def positions_of_another_mode(patch: pytest.MonkeyPatch) -> None:
    """The batch has the positions of mode `document`."""
    found = batch.positions
    patch.setattr(batch, "positions", lambda mode, *words, **names: found("document", *words, **names))


def swapped_keys(patch: pytest.MonkeyPatch) -> None:
    """Waiting pieces look their keys up at the wrong rows."""
    make = batch.plan_exchange

    def make_wrong(*placed: Any, **options: Any) -> Any:
        plan = make(*placed, **options)
        plan.key_index[:] = plan.key_index[::-1].copy()
        return plan

    patch.setattr(batch, "plan_exchange", make_wrong)


def unchanged_tokens(patch: pytest.MonkeyPatch) -> None:
    """The change never reaches the model."""
    patch.setattr(probe, "replace", lambda window, **fields: window)


@pytest.mark.parametrize(
    ("broken", "overrides", "ranks", "complaint"),
    [
        ("merged_documents", [], 1, "rows moved that cannot see a change, in documents"),
        ("positions_of_another_mode", [], 1, "wrong for mode anchor: positions"),
        ("swapped_keys", ["parallel.context=2", *ZIGZAG_FULL], 2, "CP 2        differs"),
        ("unchanged_tokens", [], 1, "of the changed rows did not move"),
    ],
)  # fmt: skip
def test_what_is_broken_fails(
    run_file: Path, broken: str, overrides: list[str], ranks: int, complaint: str
) -> None:
    status, printed = check(run_file, *overrides, ranks=ranks, broken=broken)
    assert status == 1 and complaint in printed and printed.rstrip().endswith("check FAILED"), printed
