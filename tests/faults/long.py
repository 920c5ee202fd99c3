"""The fault suite's long form: many kills and corruptions, drawn from a seed, and what became of them.

    python tests/faults/long.py --kills 40 --corruptions 200 --steps 2000 --cases 1000

prints, part by part:

    kills: 40 of ranks and of preprocessing, 0 lost, 0 diverged
    corruptions: 200 made, 200 detected and named, 0 trained on
    2000 steps, 100 checkpoints: resident memory 455.5 to 455.6 MB (+0.10 KB a step), ...104 to 104
    fuzz: 8 parsers, 8000 files, 5321 refused, 0 crashes

and ends with status 1 where something was lost, diverged, or went unnoticed. Needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # as pytest does, for processes of `run_ranks` too

import numpy as np
import psutil
from faults import scenes, test_fuzz
from faults.test_checkpoint_faults import fault_of

from anchor_megatron.config import Config, load_config, save_config
from anchor_megatron.data.documents import Documents
from anchor_megatron.testing.ranks import RankError, close_ranks, run_ranks
from anchor_megatron.training.checkpoint_find import folder_name, step_folders
from anchor_megatron.training.loop import Run
from anchor_megatron.training.manifest import MANIFEST, listed_files


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


def kills(number: int, data: Path, folder: Path, dice: random.Random) -> bool:
    """Runs killed again and again until they end; each must come to what the undisturbed one came to."""
    straight = scenes.configuration(data, folder / "straight")
    began = time.monotonic()
    run_ranks(scenes.RANKS, train, straight, 0, None)
    seconds = time.monotonic() - began
    done, lost, diverged, runs, places = 0, 0, 0, 0, Counter[str]()
    while done < number:
        runs += 1
        config = scenes.configuration(data, folder / f"run{runs}")
        kill: tuple | None = (0,)
        while kill is not None:
            kill = draw(dice, seconds) if done < number else None
            before = next(iter(step_folders(folder / f"run{runs}")), 0)
            try:
                first = run_ranks(scenes.RANKS, train, config, dice.randrange(scenes.RANKS), kill)[0]
                lost += first < before
                kill = None
            except RankError as error:
                if "died with exit code -9" not in str(error):
                    raise
                done += 1
                places[str(kill[0]) if kill is not None and isinstance(kill[0], str) else "any time"] += 1
                lost += next(iter(step_folders(folder / f"run{runs}")), 0) < before
        try:
            scenes.assert_same_run(config, straight)
        except AssertionError as error:
            diverged += 1
            print(f"run{runs}: {error}")
        shutil.rmtree(folder / f"run{runs}", ignore_errors=True)  # a thread of the run deletes in it too
    killed, damaged = preprocessing(max(2, number // 10), data, folder, dice)
    what = f"{done} of ranks in {runs} runs and {killed} of preprocessing"
    print(f"kills: {what}, {lost} lost, {diverged} diverged, {damaged} data sets damaged")
    print("    " + ", ".join(f"{place} {count}" for place, count in places.most_common()))
    return not (lost or diverged or damaged)


def draw(dice: random.Random, seconds: float) -> tuple:
    """Where, or when, to die."""
    if dice.random() < 0.3:
        return (dice.uniform(0.1, seconds),)
    point = dice.choice(list(scenes.POINTS))
    calls = {"exchange": 60, "step": scenes.STEPS, "optimizer": scenes.STEPS, "resuming": 1}
    return point, dice.randint(1, calls.get(point, 4)), dice.random() < 0.5


def make_data(rank: int, world_size: int, folder: Path, seconds: float | None) -> float:
    """Preprocesses, and dies after so many seconds; returns how many it took."""
    began = time.monotonic()
    fate = contextlib.nullcontext() if seconds is None else scenes.dying_after(seconds)
    with scenes.quiet(), fate:
        scenes.make_data(folder)
    return time.monotonic() - began


def preprocessing(number: int, data: Path, folder: Path, dice: random.Random) -> tuple[int, int]:
    """Preprocessing killed, and run again: the same bytes, and what was left before either those or refused.

    Returns the kills that came in time and the data sets that differ.
    """
    killed = damaged = 0
    (folder / "timed").mkdir()
    seconds = run_ranks(1, make_data, folder / "timed", None)[0]
    for case in range(number):
        place = folder / f"data{case}"
        place.mkdir()
        try:
            run_ranks(1, make_data, place, dice.uniform(0.0, seconds))
        except RankError:
            killed += 1
        if _refusal(lambda place=place: Documents(place / "set")) is None:
            damaged += not _same_data(place / "set", data)
        run_ranks(1, make_data, place, None)
        damaged += not _same_data(place / "set", data)
    return killed, damaged


def _same_data(one: Path, other: Path) -> bool:
    return all(
        one.with_suffix(end).read_bytes() == other.with_suffix(end).read_bytes() for end in (".bin", ".idx")
    )


def corruptions(number: int, data: Path, folder: Path, dice: random.Random) -> bool:
    """Files of checkpoints, indices, data and configurations, damaged one at a time."""
    config = scenes.configuration(data, folder / "whole")
    run_ranks(scenes.RANKS, train, config, 0, None)
    whole = [folder / "whole" / folder_name(step) for step in (scenes.STEPS, scenes.STEPS - scenes.INTERVAL)]
    save_config(config, folder / "run.yaml")
    made, missed, kinds = 0, 0, Counter[str]()
    while made < number:
        kind = dice.choices(["checkpoint", "swapped file", "data", "configuration"], [6, 2, 2, 1])[0]
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        try:
            fault = damaged(kind, case, whole, data, folder / "run.yaml", dice)
        except NothingChanged:
            continue
        made += 1
        kinds[kind] += 1
        if fault is None or str(case) not in fault:
            missed += 1
            print(f"{kind}: got {fault!r}, expected a message that names the file")
    print(f"corruptions: {made} made, {made - missed} detected and named, {missed} trained on")
    print("    " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    return not missed


class NothingChanged(Exception):
    """The damage left the file as it was."""


def damaged(
    kind: str, case: Path, whole: list[Path], data: Path, yaml: Path, dice: random.Random
) -> str | None:
    """Makes one damaged thing in `case`; what opening it says, None where nothing."""
    if kind == "checkpoint":
        shutil.copytree(whole[0], case)
        name = dice.choice([*listed_files(case), MANIFEST])
        _apply(dice.choice(list(scenes.DAMAGES.values())), case / name, dice)
        return fault_of(case)
    if kind == "swapped file":
        shutil.copytree(whole[0], case)
        name = dice.choice([name for name in listed_files(case) if name.endswith(".distcp")])
        _apply(lambda content, _: (whole[1] / name).read_bytes(), case / name, dice)
        return fault_of(case)
    case.mkdir()
    if kind == "data":
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(data.with_suffix(suffix), case)
        cut = dice.choice([scenes.truncate, scenes.grow, scenes.remove])
        _apply(cut, case / f"set{dice.choice(['.bin', '.idx'])}", dice)
        return _refusal(lambda: Documents(case / "set"))
    shutil.copy(yaml, case)
    lines = yaml.read_text().splitlines()
    line = dice.choice([n for n, text in enumerate(lines) if text.startswith("  ") and ": " in text])
    field, _, value = lines[line].partition(": ")
    lines[line] = dice.choice([f"{field}x: {value}", f"{field}: [1, {{", f"{field}: [1]"])
    (case / "run.yaml").write_text("\n".join(lines))
    return _refusal(lambda: load_config(case / "run.yaml"))


def _apply(damage: scenes.Damage, path: Path, dice: random.Random) -> None:
    if not scenes.apply(damage, path, dice):
        raise NothingChanged


def _refusal(opens: scenes.Opens) -> str | None:
    try:
        opens()
    except ValueError as error:
        return str(error)
    return None


def many_steps(rank: int, world_size: int, config: Config, every: int) -> list[tuple[int, int]]:
    """Resident bytes and open files of the process after every so many steps."""
    process, seen = psutil.Process(), []
    with scenes.quiet():
        run = Run(config)
        judge = run.health.judge

        def watch(step: int, **given: bool) -> None:
            judge(step, **given)
            if step % every == 0:
                seen.append((process.memory_info().rss, process.num_fds()))

        run.health.judge = watch  # type: ignore[method-assign]
        run.train()
    return seen


def steps(number: int, data: Path, folder: Path) -> bool:
    """Memory and descriptors of a run of many steps that saves on the way, its first half left out."""
    given = dict(
        parallel=dict(context=1), train=dict(steps=number), data=dict(seq_length=64), log=dict(interval=10)
    )
    config = scenes.configuration(
        data, folder / "steps", checkpoint=dict(save_interval=max(1, number // 100)), **given
    )
    every = max(1, number // 100)
    seen = run_ranks(1, many_steps, config, every, timeout=3600.0)[0]
    memory, files = np.array(seen[len(seen) // 2 :]).T
    slope = np.polyfit(np.arange(memory.size) * every, memory, 1)[0]
    grown = f"{memory[0] / 1e6:.1f} to {memory[-1] / 1e6:.1f} MB ({slope / 1e3:+.2f} KB a step)"
    descriptors = f"file descriptors {files[0]} to {files[-1]}"
    print(f"{number} steps, 100 checkpoints: resident memory {grown}, {descriptors}")
    return slope < 2000 and files[-1] <= files[0]


def fuzz(cases: int, folder: Path) -> bool:
    """Every parser of outside bytes, on so many files each."""
    test_fuzz.make_good(folder)
    counts = {name: cases // test_fuzz.SLOW.get(name, 1) for name in test_fuzz.FILES}
    with scenes.quiet():
        refused = {name: test_fuzz.fuzz(name, folder, cases=count) for name, count in counts.items()}
    files = sum(counts.values())
    print(f"fuzz: {len(counts)} parsers, {files} files, {sum(refused.values())} refused, 0 crashes")
    return True


def main() -> int:
    """Returns the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("kills", 40), ("corruptions", 200), ("steps", 2000), ("cases", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    given, good = parser.parse_args(), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("data", "kills", "corruptions", "fuzz"):
            (folder / part).mkdir()
        with scenes.quiet():
            data = scenes.make_data(folder / "data")
        dice = random.Random(given.seed)
        for part, amount, run in (
            ("corruptions", given.corruptions, lambda n: corruptions(n, data, folder / "corruptions", dice)),
            ("kills", given.kills, lambda n: kills(n, data, folder / "kills", dice)),
            ("steps", given.steps, lambda n: steps(n, data, folder)),
            ("fuzz", given.cases, lambda n: fuzz(n, folder / "fuzz")),
        ):
            began = time.monotonic()
            if amount:
                good &= run(amount)
                print(f"    ({part} took {time.monotonic() - began:.0f} s)", flush=True)
    close_ranks()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
