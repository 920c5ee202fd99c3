"""Files of checkpoints, data sets and configurations damaged one at a time, and parsers given any bytes."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from faults import scenes, test_fuzz
from faults.parts import Part
from faults.test_checkpoint_faults import fault_of

from anchor_megatron.config import Config, load_config, save_config
from anchor_megatron.data.check import check_data_set
from anchor_megatron.data.documents import Documents
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.checkpoint_find import folder_name
from anchor_megatron.training.loop import Run
from anchor_megatron.training.manifest import MANIFEST, listed_files


def train(rank: int, world_size: int, config: Config) -> None:
    with scenes.quiet():
        Run(config).train()


KINDS = {  # and how often
    "checkpoint": 5, "missing shard": 1, "swapped file": 2, "other layout's metadata": 1, "data": 1,
    "index": 2, "configuration": 1,
}  # fmt: skip


def corruptions(number: int, data: Path, folder: Path, dice: random.Random) -> Part:
    """Files of checkpoints, indices, data and configurations, damaged one at a time."""
    config = scenes.configuration(data, folder / "whole")
    run_ranks(scenes.RANKS, train, config)
    alone = scenes.configuration(data, folder / "alone", parallel=dict(context=1))
    run_ranks(1, train, alone)
    last = folder_name(scenes.STEPS)
    whole = [folder / "whole" / last, folder / "whole" / folder_name(scenes.STEPS - scenes.INTERVAL)]
    whole.append(folder / "alone" / last)
    save_config(config, folder / "run.yaml")
    made, missed, kinds = 0, 0, Counter[str]()
    while made < number:
        kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
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
    part = Part()
    found = f"{made - missed} detected and named, {missed} trained on"
    part.add(
        f"{made} damaged files", found, ok=not missed, corruptions=dict(kinds.most_common()), missed=missed
    )
    part.add("damaged what", ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()), ok=True)
    return part


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
    if kind in ("missing shard", "swapped file", "other layout's metadata"):
        shutil.copytree(whole[0], case)
        shards = [name for name in listed_files(case) if name.endswith(".distcp")]
        name = dice.choice([".metadata", "config.yaml"] if kind == "other layout's metadata" else shards)
        other = whole[1] if kind == "swapped file" else whole[2]
        damage = scenes.remove if kind == "missing shard" else lambda content, _: (other / name).read_bytes()
        _apply(damage, case / name, dice)
        return fault_of(case)
    case.mkdir()
    if kind in ("data", "index"):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(data.with_suffix(suffix), case)
        shutil.copytree(f"{data}_tokenizer", case / "set_tokenizer")
        name = f"set{'.bin' if kind == 'data' else '.idx'}"
        _apply(dice.choice(list(scenes.DAMAGES.values())), case / name, dice)
        if kind == "index":  # as training looks at it before its first window
            return _refusal(lambda: Documents(case / "set").lengths)
        return next(iter(check_data_set(case / "set")), None)
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


def fuzz(cases: int, folder: Path) -> Part:
    """Every parser of outside bytes, on so many files each (slow ones on fewer)."""
    part = Part()
    with scenes.quiet():
        test_fuzz.make_good(folder)
        counts = {name: cases // test_fuzz.SLOW.get(name, 1) for name in test_fuzz.FILES}
        refused = {name: test_fuzz.fuzz(name, folder, cases=count) for name, count in counts.items()}
    part.add(
        f"{sum(counts.values())} files of any bytes for {len(counts)} parsers",
        f"{sum(refused.values())} refused by name, 0 crashes, at most {test_fuzz.ROOM >> 20} MB more memory",
        ok=True, files=counts, refused=refused,
    )  # fmt: skip
    part.add("which parsers", ", ".join(counts), ok=True)
    return part
