"""Results of one or several checkpoints side by side: a text table, JSON, a page of HTML, pictures.

    checkpoint   single 4K   single 32K   ...   short loss
    base         1.00        0.00               3.41
    anchor       0.98 ± 0.02 0.81 ± 0.05        3.40 ± 0.01

Checkpoints named NAME-1, NAME-2, ... are shown as NAME, with mean and spread (half the range): single ones
fluctuate.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.evaluation.judge import Judged
from anchor_megatron.evaluation.perplexity import LossByPosition

__all__ = ["Result", "read_results", "table", "write_report"]


@dataclass
class Result:
    """What is known of one checkpoint."""

    name: str
    needles: list[Judged]
    figures: dict[str, float] = field(default_factory=dict)
    by_position: LossByPosition | None = None


def write_report(folder: Path, results: Sequence[Result]) -> None:
    """Writes results.json, results.html, and the pictures that there are figures for, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    pictures = _draw(folder, results)
    shown = "".join(f'<p><img src="{name}" alt="{name}"></p>\n' for name in pictures)
    (folder / "results.html").write_text(
        "<!doctype html>\n<meta charset='utf-8'>\n<title>Long-context evaluation</title>\n"
        "<style>body{font-family:sans-serif}td,th{padding:.2em .8em;text-align:right}</style>\n"
        f"{_html_table(results)}\n{shown}"
    )


def read_results(path: Path) -> list[Result]:
    """What `write_report` wrote as results.json."""
    found = []
    for one in json.loads(path.read_text()):
        losses = one["by_position"]
        by_position = None
        if losses is not None:
            by_position = LossByPosition(**{name: tuple(values) for name, values in losses.items()})
        needles = [Judged(**judged) for judged in one["needles"]]
        found.append(Result(one["name"], needles, one["figures"], by_position))
    return found


def table(results: Sequence[Result]) -> str:
    """The text table."""
    rows = _rows(results)
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """Header, then a row a group of checkpoints; a column a score."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(re.sub(r"-\d+$", "", result.name), []).append(result)
    scores = {result.name: _scores(result) for result in results}
    columns = list(dict.fromkeys(column for one in scores.values() for column in one))
    rows = [["checkpoint", *columns]]
    for name, group in groups.items():
        found = [scores[one.name] for one in group]
        cells = [_cell([one[column] for one in found if column in one]) for column in columns]
        rows.append([name if len(group) > 1 else group[0].name, *cells])
    return rows


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = (max(values) - min(values)) / 2
    return f"{np.mean(values):.3f}" + (f" ± {spread:.3f}" if len(values) > 1 else "")


def _scores(result: Result) -> dict[str, float]:
    """Column to value: every task and length (greedy where the model wrote, else exact), then the losses."""
    scores: dict[str, float] = {}
    for task, length in dict.fromkeys((one.task, one.length) for one in result.needles):
        chosen = [one for one in result.needles if (one.task, one.length) == (task, length)]
        values = [one.exact if one.greedy is None else one.greedy for one in chosen]
        scores[f"{task} {_short(length)}"] = float(np.mean(values))
    for length in dict.fromkeys(one.length for one in result.needles):
        chosen = [one for one in result.needles if one.length == length]
        scores[f"token accuracy {_short(length)}"] = float(np.mean([one.token_accuracy for one in chosen]))
    if result.by_position is not None:
        losses = result.by_position
        scores[f"loss [{losses.start[-1]}, {losses.stop[-1]})"] = losses.whole[-1]
        scores["sliding"] = losses.sliding[-1]
    if "short_loss" in result.figures:
        scores["short loss"] = result.figures["short_loss"]
    return scores


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _html_table(results: Sequence[Result]) -> str:
    header, *rows = _rows(results)
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _draw(folder: Path, results: Sequence[Result]) -> list[str]:
    """Pictures, by file name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = []
    if any(one.needles for one in results):
        columns = min(len(results), 5)
        rows = -(-len(results) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(1.2 + 3 * columns, 3.4 * rows), squeeze=False, layout="constrained"
        )
        for panel in panels.flat[len(results) :]:
            panel.remove()
        for panel, result in zip(panels.flat, results, strict=False):
            image = _heat_map(panel, result)
        figure.colorbar(image, ax=panels, label="answer's tokens right")
        figure.savefig(folder / "needles.png", dpi=110)
        names.append("needles.png")
    if any(one.by_position for one in results):
        figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
        for result in results:
            if result.by_position is not None:
                stops = result.by_position.stop
                (line,) = panel.plot(stops, result.by_position.whole, marker=".", label=result.name)
                panel.plot(stops, result.by_position.sliding, linestyle=":", color=line.get_color())
        panel.set_xscale("log", base=2)
        panel.set(xlabel="position", ylabel="loss, nats a token (dotted: sliding window)")
        panel.legend()
        figure.savefig(folder / "loss_by_position.png", dpi=110)
        names.append("loss_by_position.png")
    plt.close("all")
    return names


def _heat_map(panel: Any, result: Result, *, bands: int = 5) -> Any:
    """Depth (five bands) by length, over all tasks with needles."""
    lengths = sorted({one.length for one in result.needles})
    grid = np.full((bands, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for band in range(bands):
            chosen = [
                one.token_accuracy
                for one in result.needles
                if one.length == length
                and one.task not in ("common", "frequent")
                and min(int(one.depth * bands), bands - 1) == band
            ]
            if chosen:
                grid[band, column] = np.mean(chosen)
    panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    panel.set_yticks(range(bands), [f"{(n + 0.5) / bands:.0%}" for n in range(bands)])
    panel.set(title=result.name, xlabel="context", ylabel="depth")
    return panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
