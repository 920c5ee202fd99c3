"""The results as a table, as pictures and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from anchor_megatron.precision.findings import Finding
from anchor_megatron.precision.tables import (
    mean_over_layers,
    number,
    profile_per_key,
    shift_rows,
    source_title,
    sources_of,
)

__all__ = ["PLOTS", "draw_plots", "summary_table", "write_report"]

PLOTS = ("shift", "first", "logit", "length", "modes", "rope")
_SECTIONS = {
    "shift": "The same tokens, all positions shifted",
    "first": "The first token's part",
    "logit": "The first token's score by distance",
    "length": "By the length of the sequence",
    "modes": "Restarting positions, running positions, an anchor",
    "rope": "By implementation of the embedding",
    "kernel": "The attention kernel itself",
}
_COLOURS = {
    "fp32": "tab:grey", "transformers": "tab:red", "megatron": "tab:orange", "te": "tab:purple",
    "ours": "tab:blue", "ours_unfused": "tab:cyan", "bf16_angles": "black", "te_kernel": "tab:pink",
    "ours_kernel": "tab:green",
}  # fmt: skip
_STYLE = """body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em} img{max-width:100%}
pre{overflow-x:auto;font-size:12px} .no{color:#a00} .yes{color:#060}"""
_INTRODUCTION = """D is the change of one query's attention weights, summed over keys without sign and
averaged over queries and heads: 0 is no change, 2 is nothing in common. The paper is <a
href="https://arxiv.org/abs/2411.13476">arXiv 2411.13476</a>. Two numbers within 10 % of each other are called
the same. A claim of growth counts as supported from a factor of 1.5, one of another order of magnitude from
10, and one of the first token carrying most of D from a quarter: a single key can have no more than half, as
a query's weights add up to 1. A model's figures are means over its layers.
"""


def summary_table(results: dict[str, Any]) -> str:
    """One table, a line an implementation: D by source at two shifts, and the error of the turned vectors."""
    rows = [row for row in shift_rows(results) if row["arithmetic"] == "fused"]
    sources = list(dict.fromkeys(row["vectors"] for row in rows))
    far = [131_072, 1_048_576, 4_194_304]
    head = ["embedding", *(f"D {source} {d}" for source in sources for d in ("10k", "1M"))]
    lines = [head + ["roundings 128K", "1M", "4M"]]
    for rope in results["ropes"]:
        d = {(row["vectors"], row["shift"]): row["difference"] for row in rows if row["rope"] == rope}
        error = {row["position"]: row["multiple"] for row in results["rope"] if row["rope"] == rope}
        cells = [d.get((source, shift)) for source in sources for shift in (10_000, 1_000_000)]
        cells += [error[position] for position in far]
        lines.append([rope, *("" if cell is None else number(cell) for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) + 3)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def write_report(results: dict[str, Any], found: list[Finding], folder: Path) -> None:
    """Writes the plots as `folder`/NAME.png and the page as `folder`/report.html."""
    draw_plots(results, folder)
    names = "".join(f"<li>{name}: {html.escape(title)}</li>" for name, title in results["ropes"].items())
    run = (
        f"{results['command']}, on {results['device']}, torch {results['torch']}, {results['seconds']:.0f} s."
    )
    parts = [
        "<!doctype html><meta charset=utf-8><title>Precision report</title>",
        f"<style>{_STYLE}</style><h1>Rotary embedding in BF16: what this run found</h1>",
        f"<p>{_INTRODUCTION}</p><p>{html.escape(run)}</p>",
        f"<pre>{html.escape(summary_table(results))}</pre><ul>{names}</ul>{_verdicts(found)}",
    ]
    for section, title in _SECTIONS.items():
        mine = [finding for finding in found if finding.section == section]
        parts.append(f"<h2>{title}</h2>")
        if section in PLOTS:
            picture = base64.b64encode((folder / f"{section}.png").read_bytes()).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{picture}">')
        parts.append("<ul>" + "".join(_item(finding) for finding in mine) + "</ul>")
    (folder / "report.html").write_text("\n".join(parts) + "\n")


def _item(finding: Finding) -> str:
    text = html.escape(finding.text)
    if not finding.claim:
        return f"<li>{text}</li>"
    kind = "yes" if finding.verdict == "supports" else "no"
    claim = html.escape(finding.claim)
    return f"<li>{text} <span class={kind}>This {finding.verdict} the paper's claim: {claim}</span></li>"


def _verdicts(found: list[Finding]) -> str:
    """How many findings support each claim of the paper."""
    claims = dict.fromkeys(finding.claim for finding in found if finding.claim)
    lines = []
    for claim in claims:
        verdicts = [finding.verdict for finding in found if finding.claim == claim]
        yes = verdicts.count("supports")
        lines.append(f"<li>{html.escape(claim)} Supported by {yes} of {len(verdicts)} sources here.</li>")
    return "<h2>The paper's claims</h2><ul>" + "".join(lines) + "</ul>"


def draw_plots(results: dict[str, Any], folder: Path) -> None:
    """One PNG for each of PLOTS."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw = {"shift": _draw_shift, "first": _draw_first, "logit": _draw_logit, "length": _draw_length,
            "modes": _draw_modes, "rope": _draw_rope}  # fmt: skip
    for name in PLOTS:
        figure = draw[name](plt, results)
        figure.savefig(folder / f"{name}.png", dpi=90)
        plt.close(figure)


def _panels(plt: Any, results: dict[str, Any], sources: list[str]) -> tuple[Any, list[tuple[Any, str]]]:
    """A row of axes, one a source, with its title."""
    figure, axes = plt.subplots(
        1, len(sources), figsize=(4 * len(sources), 3.8), layout="constrained", squeeze=False
    )
    for axis, source in zip(axes[0], sources, strict=True):
        axis.set_title(source_title(results, source).replace(" with ", "\nwith "), fontsize=9)
    return figure, list(zip(axes[0], sources, strict=True))


def _lines(axis: Any, rows: list[dict[str, Any]], x: str, y: str, **style: Any) -> None:
    """A line an implementation, in its colour."""
    for rope in dict.fromkeys(row["rope"] for row in rows):
        mine = [row for row in rows if row["rope"] == rope]
        marks = dict(color=_COLOURS[rope], marker="o", markersize=3, label=rope)
        axis.plot([row[x] for row in mine], [row[y] for row in mine], **marks, **style)


def _draw_shift(plt: Any, results: dict[str, Any]) -> Any:
    # Megatron-Core's unfused arithmetic is that of transformers: one line would hide the other
    rows = [r for r in shift_rows(results) if r["arithmetic"] == "fused" and r["rope"] != "megatron"]
    figure, panels = _panels(plt, results, sources_of(rows))
    for axis, source in panels:
        _lines(axis, [row for row in rows if row["vectors"] == source], "shift", "difference")
        axis.set(xscale="symlog", yscale="log", xlabel="shift of all positions, tokens")
    panels[0][0].set_ylabel(f"D against a shift of {results['settings']['reference']}")
    panels[0][0].legend(fontsize=7)
    return figure


def _draw_first(plt: Any, results: dict[str, Any]) -> Any:
    rows = [
        row for row in shift_rows(results)
        if row["arithmetic"] == "fused" and row["shift"] == 10_000 and row["rope"] in ("transformers", "ours")
    ]  # fmt: skip
    figure, panels = _panels(plt, results, sources_of(rows))
    for axis, source in panels:
        for row in (row for row in rows if row["vectors"] == source):
            heights = [part / sum(row["profile"]) for part in profile_per_key(row)]
            style = dict(drawstyle="steps-mid", color=_COLOURS[row["rope"]], label=row["rope"])
            axis.plot(range(len(heights)), heights, **style)
        names = ["first", "1", *(f"{2**i}-" for i in range(1, len(heights) - 1))]
        axis.set_xticks(range(len(heights)), names, rotation=60, fontsize=7)
        axis.set(yscale="log", xlabel="key")
    panels[0][0].set_ylabel("share of D, a key (shift of 10,000)")
    panels[0][0].legend(fontsize=7)
    return figure


def _draw_logit(plt: Any, results: dict[str, Any]) -> Any:
    every = mean_over_layers(results["logit"], "rope", "distance")
    rows = [row for row in every if row["rope"] not in ("megatron", "bf16_angles")]
    figure, panels = _panels(plt, results, sources_of(rows))
    for axis, source in panels:
        _lines(axis, [row for row in rows if row["vectors"] == source], "distance", "error")
        axis.set(xscale="log", yscale="log", xlabel="distance of the query, tokens")
    panels[0][0].set_ylabel("first token's score: error against FP64")
    panels[0][0].legend(fontsize=7)
    return figure


def _draw_length(plt: Any, results: dict[str, Any]) -> Any:
    figure, panels = _panels(plt, results, sources_of(results["length"]))
    for axis, source in panels:
        mine = [row for row in results["length"] if row["vectors"] == source]
        _lines(axis, mine, "length", "difference")
        ours = [row for row in mine if row["rope"] == "ours"]
        part = [row["difference"] * row["first_share"] for row in ours]
        axis.plot(
            [row["length"] for row in ours], part, color=_COLOURS["ours"], linestyle=":",
            label="of ours, the first token's part",
        )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="length, tokens")
    panels[0][0].set_ylabel("D of the last queries")
    panels[0][0].legend(fontsize=7)
    return figure


def _draw_modes(plt: Any, results: dict[str, Any]) -> Any:
    every = mean_over_layers(results["modes"], "mode", "rope", "offset")
    rows = [row for row in every if row["rope"] in ("transformers", "ours")]
    figure, panels = _panels(plt, results, sources_of(rows))
    styles = {"document_reset": ":", "document": "--", "anchor": "-"}
    for axis, source in panels:
        for mode, style in styles.items():
            mine = [row for row in rows if row["vectors"] == source and row["mode"] == mode]
            _lines(axis, mine, "offset", "error", linestyle=style)
        axis.set(xscale="symlog", xlabel="document's offset in its window, tokens")
        axis.set_ylim(bottom=0)
    panels[0][0].set_ylabel("departure from FP64 at the same positions")
    handles = [
        plt.Line2D([], [], color="black", linestyle=style, label=mode) for mode, style in styles.items()
    ]
    handles += [plt.Line2D([], [], color=_COLOURS[rope], label=rope) for rope in ("transformers", "ours")]
    panels[0][0].legend(handles=handles, fontsize=7)
    return figure


def _draw_rope(plt: Any, results: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = [row for row in results["rope"] if row["rope"] not in ("megatron", "bf16_angles")]
    _lines(axis, rows, "position", "multiple")
    axis.axhline(1.0, color="black", linewidth=0.5)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="position",
        ylabel="error, in roundings of the exact result to BF16",
    )
    axis.legend(fontsize=8)
    return figure
