"""The report: one HTML file with charts and tables, which needs nothing but itself."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from anchor_megatron.profiling import charts
from anchor_megatron.profiling.simulate import TARGETS
from anchor_megatron.profiling.table import PREDICTIONS, label

__all__ = ["write_report"]

Rows = list[dict[str, Any]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto;
       padding: 0 1em; color: #222 }
h1 { font-size: 1.5em; margin-bottom: .2em }
h2 { font-size: 1.15em; margin-top: 2em }
ul { margin: .6em 0 }
.small { color: #666; font-size: .88em }
.charts { display: flex; flex-wrap: wrap; gap: 10px }
.charts img { flex: 1 1 540px; min-width: 0; max-width: 100% }
.wide img { max-width: 100% }
table { border-collapse: collapse; font-size: .85em; font-variant-numeric: tabular-nums }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #e4e4e4 }
th { color: #555 }
td.name { text-align: left }
td.met { color: #1a7f37 }
td.missed { color: #b3261e }
tr.new td { border-top: 2px solid #bbb }
"""


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` (what `tools/profile_cp.py` puts into JSON) as HTML."""
    body = _simulated(results) if results["kind"] == "simulate" else _measured(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Context parallelism</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _simulated(results: dict[str, Any]) -> str:
    rows: Rows = results["rows"]
    pictures = [
        (charts.efficiency_chart(rows), "efficiency against ranks"),
        (charts.balance_chart(rows), "balance against ranks"),
        (charts.bytes_chart(rows), "received bytes against ranks"),
        (charts.time_chart(rows), "where the time goes"),
    ]
    machine = ", ".join(f"{name} {value:g}" for name, value in results["machine"].items())
    return "\n".join(
        [
            "<h1>Context parallelism, predicted</h1>",
            f"<p class='small'>{_what(results)}. Rates: {machine}.</p>",
            f"<ul>{''.join(f'<li>{line}</li>' for line in _headlines(rows))}</ul>",
            f"<div class='charts'>{''.join(_image(*picture) for picture in pictures)}</div>",
            "<h2>Placement: achieved, target, bound</h2>",
            "<p class='small'>Balance: the largest rank's attention area over the mean. Received: keys and "
            "values that the worst rank receives, as a share of a full ring's. Worst: of the windows. "
            "Green: at or below the target.</p>",
            _placement_rows(rows),
            "<h2>Predicted milliseconds of one layer, forward and backward</h2>",
            *_levels(rows),
            _prediction_rows(rows),
        ]
    )


def _levels(rows: Rows) -> list[str]:
    """What the columns on levels mean, and on nodes if there are any."""
    lines = [
        "<p class='small'>Two levels: share of the windows in which rows go to a node, or to a group of "
        "ranks of one node, once and are handed on there, as that is quicker. Head parts: of the heads, "
        "which travel one after another, each under attention to the part before.</p>"
    ]
    if any("across_one_level_mb" in row for row in rows):
        lines.append(
            "<p class='small'>Across: megabytes of keys and values that the mean rank receives from other "
            "nodes in one level and in two.</p>"
        )
    return lines


def _measured(results: dict[str, Any]) -> str:
    rows: Rows = results["rows"]
    lines = []
    for name, who in zip(PREDICTIONS, ("with the rates known before", "fitted to these rows"), strict=True):
        if errors := [abs(row[name] / row["total_ms"] - 1) for row in rows if name in row]:
            lines.append(f"The cost model {who} is at most {max(errors):.0%} off.")
    columns = {
        "attention_ms": 2, "exchange_ms": 2, "hidden_ms": 2, "forward_ms": 2, "backward_ms": 2, "total_ms": 2,
        "predicted_ms": 2, "fitted_ms": 2, "efficiency": 3, "balance": 3, "received": 3, "megabytes": 1,
    }  # fmt: skip
    return "\n".join(
        [
            "<h1>Context parallelism, measured</h1>",
            f"<p class='small'>{html.escape(results['device'])}, {results['date']}. {_what(results)}.</p>",
            f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>",
            f"<div class='wide'>{_image(charts.measured_chart(rows), 'measured milliseconds')}</div>",
            "<h2>Milliseconds, forward and backward, of the slowest rank</h2>",
            _rows_with(columns, rows, before=("heads", "workload", "tokens")),
        ]
    )


def _what(results: dict[str, Any]) -> str:
    shape = results["shape"]
    heads = f"{shape['heads']} query and {shape['groups']} key/value heads of {shape['head_dim']}, "
    nodes = results["ranks_per_node"]
    window = f"{results['tokens_per_rank']:,} tokens a rank" if results["tokens_per_rank"] else (
        f"{results['total_tokens']:,} tokens in all")  # fmt: skip
    return html.escape(
        f"Document lengths from {results['lengths']}, cut at 1/{results['parts']} of a window; {window}; "
        f"{heads if results['kind'] == 'simulate' else ''}{results['windows']} windows a size; "
        + (f"{nodes} ranks a node" if nodes else "all ranks in one node")
    )


def _headlines(rows: Rows) -> list[str]:
    """What a reader should take away, from the rows."""
    ours = [row for row in rows if "plan_ms" in row]
    last = max((row for row in ours if row["ranks"] <= 64), key=lambda row: row["ranks"], default=ours[-1])
    beside = {row["name"]: row for row in rows if row["ranks"] == last["ranks"] and row["name"] != "ours"}
    others = ", ".join(f"{html.escape(name)} {row['efficiency']:.0%}" for name, row in beside.items())
    lines = [
        f"On {last['ranks']} ranks ours keeps {last['efficiency']:.0%} of one rank's speed a rank; {others}.",
        f"Area is within {max(row['balance'] for row in ours) - 1:.1%} of level on average and "
        f"{max(row['worst_balance'] for row in ours) - 1:.1%} in the worst window of any size.",
    ]
    lines += [
        f"On {row['ranks']:,} ranks the target of {TARGETS[row['ranks']][2]} for received bytes cannot be "
        f"met: no placement receives less than {row['least_received']:.3f}; ours {row['needed']:.3f}."
        for row in ours
        if row["ranks"] in TARGETS and row["least_received"] > TARGETS[row["ranks"]][2]
    ]
    return lines


def _placement_rows(rows: Rows) -> str:
    header = (
        "<tr><th>ranks<th>balance<th>worst<th>target<th>bound<th>received<th>worst<th>target<th>bound<th>gap"
        "<th>sent<th>plan ms</tr>"
    )
    lines = []
    for row in rows:
        if "plan_ms" not in row:
            continue
        level, worst, share, _ = TARGETS.get(row["ranks"], (None, None, None, None))
        bound = row["least_received"]
        gap = f"{row['needed'] / bound - 1:+.0%}" if bound else ""
        target = f"{level or ''}{f' ({worst})' if worst else ''}"
        cells = [
            f"<td>{row['ranks']:,}",
            _against(row["balance"], level, 4),
            _against(row["worst_balance"], worst, 4),
            f"<td>{target}<td>{row['least_balance']:.3f}",
            _against(row["needed"], share, 3),
            f"<td>{row['worst_needed']:.3f}<td>{share or ''}<td>{bound:.3f}<td>{gap}",
            f"<td>{row['sent']:.3f}<td>{row['plan_ms']:.1f}",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{header}{''.join(lines)}</table>"


def _against(value: float, target: float | None, digits: int) -> str:
    kind = (
        "" if target is None else " class='met'" if value <= target + 0.5 * 10**-digits else " class='missed'"
    )
    return f"<td{kind}>{value:.{digits}f}"


def _prediction_rows(rows: Rows) -> str:
    columns = {
        "attention_ms": 2, "exchange_ms": 2, "not_hidden_ms": 2, "total_ms": 2, "efficiency": 3, "balance": 3,
        "received": 3, "sent": 3, "two_levels": 2, "head_parts": 1,
    }  # fmt: skip
    if any("across_one_level_mb" in row for row in rows):
        columns |= {"across_one_level_mb": 1, "across_two_levels_mb": 1}
    return _rows_with(columns, rows)


def _rows_with(columns: dict[str, int], rows: Rows, *, before: tuple[str, ...] = ()) -> str:
    """A table of these columns and their digits, with a line between sizes."""
    head = "".join(f"<th>{name.removesuffix('_ms').replace('_', ' ')}" for name in (*before, "", *columns))
    lines, last = [], None
    for row in rows:
        cells = "".join(f"<td>{html.escape(str(row[name]))}" for name in before)
        cells += f"<td class='name'>{html.escape(label(row))}"
        cells += "".join(
            "<td>" if row.get(name) is None else f"<td>{row[name]:,.{digits}f}"
            for name, digits in columns.items()
        )
        lines.append(f"<tr{' class=new' if row['ranks'] != last else ''}><td>{row['ranks']:,}{cells}</tr>")
        last = row["ranks"]
    return f"<table><tr><th>ranks{head}</tr>{''.join(lines)}</table>"


def _image(picture: bytes, what: str) -> str:
    return f"<img alt='{what}' src='data:image/svg+xml;base64,{base64.b64encode(picture).decode()}'>"
