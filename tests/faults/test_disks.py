"""Slow and full disks, a clock that jumps, a data file that vanishes; `parts/disks.py` does more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import disturbances, scenes

from anchor_megatron.config import Config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.loop import Run

pytestmark = pytest.mark.faults


def train(rank: int, world_size: int, config: Config, disturbed: bool) -> str:
    """What the rank said; disturbed: of a run that has everything against it, and then of its next start."""
    run = Run(config)
    if not disturbed:
        return scenes.listening(run.train)[1]
    vanish = {2: lambda: os.unlink(f"{config.data.train}.bin")}
    with disturbances.slow_disk(0.05), disturbances.jumping_clock(), disturbances.at_steps(run, vanish):
        _, heard = scenes.listening(run.train)
    with pytest.raises(ValueError, match=r"data.train: .*set.bin: no such file"):
        Run(config)
    return heard


def test_slow_disks_jumping_clocks_and_a_vanished_file_change_nothing(tmp_path: Path) -> None:
    data = scenes.make_data(tmp_path)
    straight, disturbed = (
        scenes.configuration(data, tmp_path / name, parallel=dict(context=1), train=dict(steps=4))
        for name in ("straight", "disturbed")
    )
    run_ranks(1, train, straight, False)
    [heard] = run_ranks(1, train, disturbed, True)
    scenes.assert_same_run(disturbed, straight)
    waits = [
        float(line.split("data wait ")[1].split()[0]) for line in heard.splitlines() if "data wait" in line
    ]
    assert len(waits) == 4 and min(waits) > 100, "two reads a step, 50 ms each"


def test_a_report_that_cannot_be_written_is_told_and_gone_on_from(tmp_path: Path) -> None:
    data = scenes.make_data(tmp_path)
    full = dict(jsonl="/dev/full", prometheus=str(tmp_path / "run.prom"))
    config = scenes.configuration(
        data,
        tmp_path / "run",
        parallel=dict(context=1),
        train=dict(steps=2),
        log=full,
        checkpoint=dict(directory=None),
    )
    [heard] = run_ranks(1, train, config, False)
    assert heard.count("a report could not be written: [Errno 28] No space left on device") == 3, (
        "the end is told too"
    )
    assert "anchor_megatron_step 2.0" in (tmp_path / "run.prom").read_text(), "the others are written"
