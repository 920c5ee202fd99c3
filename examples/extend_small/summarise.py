"""The experiment's JSON files, one a seed, as tables in Markdown and pictures.

    python examples/extend_small/summarise.py seed1.json seed2.json --output docs/images

Prints the tables; every cell is the mean over the seeds and half their range.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.evaluation.judge import Judged
from anchor_megatron.evaluation.perplexity import LossByPosition
from anchor_megatron.evaluation.report import Result, write_report

Seeds = list[dict[str, Any]]


def main() -> None:
    """Prints tables, writes pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and results.html")
    given = parser.parse_args()
    seeds: Seeds = [json.loads(path.read_text()) for path in given.seeds]
    names = ["base", *(key.removeprefix("extend ") for key in seeds[0] if key.startswith("extend "))]
    print(scores(seeds, names, "token_accuracy", "Answer tokens right (teacher-forced)"))
    print(scores(seeds, names, "exact", "Answers exactly right"))
    print(losses(seeds, names))
    print(speeds(seeds, names[1:]))
    results = [result(found, name, n + 1) for name in names for n, found in enumerate(seeds)]
    write_report(given.output, results)


def result(found: dict[str, Any], name: str, number: int) -> Result:
    """One model as the evaluation's report takes it."""
    judged = found[f"judged {name}"]
    by_position = LossByPosition(**{key: tuple(value) for key, value in judged["by_position"].items()})
    needles = [Judged(**one) for one in judged["needles"]]
    return Result(f"{name}-{number}", needles, judged["figures"], by_position)


def scores(seeds: Seeds, names: list[str], score: str, title: str) -> str:
    """A row a model, a column a length, over all tasks; then one a task at the longest length."""
    needles = seeds[0]["judged base"]["needles"]
    lengths = sorted({one["length"] for one in needles})
    tasks = list(dict.fromkeys(one["task"] for one in needles))
    columns: dict[str, tuple[str | None, int]] = {f"{length // 1024}K": (None, length) for length in lengths}
    columns |= {f"{task} {lengths[-1] // 1024}K": (task, lengths[-1]) for task in tasks}
    rows = []
    for name in names:
        judged = [found[f"judged {name}"]["needles"] for found in seeds]
        values = [[_mean(one, score, *column) for one in judged] for column in columns.values()]
        rows.append([name, *(cell(one, "{:.2f}") for one in values)])
    return markdown(title, ["model", *columns], rows)


def _mean(needles: list[dict[str, Any]], score: str, task: str | None, length: int) -> float:
    """Of one model's questions of a length, of one task or of all."""
    chosen = [one for one in needles if one["length"] == length and task in (None, one["task"])]
    return float(np.mean([one[score] for one in chosen]))


def losses(seeds: Seeds, names: list[str]) -> str:
    """Loss in every bucket of positions, of the last through the sliding window, and on short documents."""
    first = seeds[0]["judged base"]["by_position"]
    buckets = [f"[{start}, {stop})" for start, stop in zip(first["start"], first["stop"], strict=True)]
    rows = []
    for name in names:
        judged = [found[f"judged {name}"] for found in seeds]
        values = [[one["by_position"]["whole"][n] for one in judged] for n in range(len(buckets))]
        values.append([one["by_position"]["sliding"][-1] for one in judged])
        values.append([one["figures"]["short_loss"] for one in judged])
        rows.append([name, *(cell(one, "{:.3f}") for one in values)])
    return markdown("Loss by position", ["model", *buckets, "last, sliding", "short"], rows)


def speeds(seeds: Seeds, modes: list[str]) -> str:
    """Tokens a second and attention's share of the time, at the extension's length and further ones."""
    further = [key for key in seeds[0] if key.startswith("speed ")]
    header = ["mode", "steps", "M tokens", "tokens/s", "attention's share"]
    header += [f"{key.removeprefix('speed ')}: {what}" for key in further for what in ("tokens/s", "share")]
    rows = []
    for mode in modes:
        log = [found[f"extend {mode}"] for found in seeds]
        row = [mode, str(log[0]["steps"]), cell([one["tokens"] / 1e6 for one in log], "{:.2f}")]
        for key in ("speed", *further):
            measured = [found[key][mode] for found in seeds if mode in found[key]]
            row.append(cell([one["tokens_per_second"] for one in measured], "{:,.0f}"))
            row.append(
                cell([one["attention_share"] for one in measured if "attention_share" in one], "{:.2f}")
            )
        rows.append(row)
    return markdown("Training", header, rows)


def cell(values: list[float], form: str) -> str:
    """Mean and half the range."""
    if not values:
        return ""
    spread = (max(values) - min(values)) / 2
    return form.format(float(np.mean(values))) + (f" ± {form.format(spread)}" if len(values) > 1 else "")


def markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A table under a bold title."""
    lines = [f"**{title}**", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


if __name__ == "__main__":
    main()
