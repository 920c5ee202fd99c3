"""Runs killed again and again until they end, and preprocessing killed while it writes.

Each run must come to what an undisturbed one came to, bit for bit, from no older a checkpoint than its last.
A data set must have the undisturbed one's bytes once preprocessing was run again, and before that those or be
refused.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from faults import scenes
from faults.parts import Part

from anchor_megatron.config import Config
from anchor_megatron.data.documents import Documents
from anchor_megatron.testing.ranks import RankError, run_ranks
from anchor_megatron.training.checkpoint_find import step_folders
from anchor_megatron.training.loop import Run

ROOT = Path(__file__).resolve().parents[3]
FIRST_RANK = ("manifest", "commit rename", "deletion of an old one")  # where the first rank alone comes
COPIES = 40  # of the small set's text, so that preprocessing takes long enough to be killed in


def train(rank: int, world_size: int, config: Config, victim: int, kill: tuple | None) -> int:
    """A run, killed at a point of `scenes.POINTS` or after some seconds; returns the step it began from."""
    fate: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if kill is not None and rank == victim:
        if isinstance(kill[0], str):
            fate = scenes.dying_at(kill[0], call=kill[1], leaving=kill[2])
        else:
            fate = scenes.dying_after(kill[0])
    with scenes.quiet(), fate:
        run = Run(config)
        run.train()
    return run.first_step


def kills(number: int, data: Path, folder: Path, dice: random.Random) -> Part:
    """Of ranks: first at every place once."""
    part, places = Part(), Counter[str]()
    straight = scenes.configuration(data, folder / "straight")
    began = time.monotonic()
    run_ranks(scenes.RANKS, train, straight, 0, None)
    seconds = time.monotonic() - began
    lost = diverged = runs = 0
    while places.total() < number:
        runs += 1
        config = scenes.configuration(data, folder / f"run{runs}")
        lost += killed_until_it_ends(config, places, number, seconds, dice)
        try:
            scenes.assert_same_run(config, straight)
        except AssertionError as error:
            diverged += 1
            print(f"run{runs}: {error}")
        shutil.rmtree(folder / f"run{runs}", ignore_errors=True)  # a thread of the run deletes in it too
    part.add(
        f"kill -9 of ranks, {number} times in {runs} runs",
        f"{lost} lost, {diverged} diverged",
        ok=not (lost or diverged),
        kills=dict(places.most_common()), lost=lost, diverged=diverged,
    )  # fmt: skip
    part.add("killed where", ", ".join(f"{place} {count}" for place, count in places.most_common()), ok=True)
    return part


def killed_until_it_ends(
    config: Config, places: Counter[str], number: int, seconds: float, dice: random.Random
) -> int:
    """Starts the run again and again; how often it began, or was left, at an older checkpoint than before."""
    folder, lost = Path(str(config.checkpoint.directory)), 0
    while True:
        before = next(iter(step_folders(folder)), 0)
        kill = draw(dice, seconds, places, before) if places.total() < number else None
        victim = 0 if kill is not None and kill[0] in FIRST_RANK else dice.randrange(scenes.RANKS)
        try:
            first = run_ranks(scenes.RANKS, train, config, victim, kill)[0]
            return lost + (first < before)
        except RankError as error:
            if "died with exit code -9" not in str(error) or kill is None:
                raise
            places[kill[0] if isinstance(kill[0], str) else "any time"] += 1
            lost += next(iter(step_folders(folder)), 0) < before


def draw(dice: random.Random, seconds: float, places: Counter[str], before: int) -> tuple:
    """Where, or when, to die: mostly where nobody has yet. before: step of the checkpoint begun from."""
    points = [point for point in scenes.POINTS if before or point != "resuming"]
    missing = [point for point in points if not places[point]]
    if dice.random() < 0.3:
        return (dice.uniform(0.1, seconds),)
    if missing:
        return dice.choice(missing), 1, dice.random() < 0.5
    point = dice.choice(points)
    calls = {"exchange": 60, "step": scenes.STEPS, "optimizer": scenes.STEPS, "resuming": 1}
    return point, dice.randint(1, calls.get(point, 4)), dice.random() < 0.5


def preprocessing(number: int, data: Path, folder: Path, dice: random.Random) -> Part:
    """Of `tools/preprocess_data.py` and its processes, between its first file and its end."""
    text = folder / "text.jsonl"
    text.write_text("\n".join([data.with_suffix(".jsonl").read_text()] * COPIES))
    (folder / "whole").mkdir()
    _, during, _ = preprocess(text, folder / "whole" / "set", None)
    killed = damaged = refused = 0
    while killed < number:
        place = folder / f"data{killed}"
        place.mkdir(exist_ok=True)
        *_, status = preprocess(text, place / "set", dice.uniform(0.0, during))
        killed += status == -signal.SIGKILL
        try:
            Documents(place / "set")
            damaged += not _same_data(place, folder / "whole")
        except ValueError:
            refused += status == -signal.SIGKILL
        *_, status = preprocess(text, place / "set", None)
        damaged += status != 0 or not _same_data(place, folder / "whole")
        shutil.rmtree(place)
    part = Part()
    part.add(
        f"kill -9 of preprocessing, {killed} times",
        f"{refused} data sets refused until it was run again, {damaged} damaged",
        ok=not damaged, kills=killed, refused=refused, damaged=damaged,
    )  # fmt: skip
    return part


def preprocess(text: Path, output: Path, kill_after: float | None) -> tuple[float, float, int]:
    """Seconds before its first file and from then on, exit status. kill_after: seconds behind that file."""
    words = [str(ROOT / "tools" / "preprocess_data.py"), str(text), "--train-tokenizer", "300"]
    more = ["--output", str(output), "--workers", "2", "--overwrite"]
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *words, *more], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        while process.poll() is None and not any(output.parent.iterdir()):
            time.sleep(0.005)
        first = time.monotonic()
        if kill_after is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return first - began, time.monotonic() - first, status


def _same_data(one: Path, other: Path) -> bool:
    return all(
        (one / f"set{end}").read_bytes() == (other / f"set{end}").read_bytes() for end in (".bin", ".idx")
    )
