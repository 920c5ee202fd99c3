"""Rows of a simulation or a measurement as text."""

from __future__ import annotations

from typing import Any

from anchor_megatron.profiling.simulate import TARGETS

__all__ = ["PREDICTIONS", "measured_line", "measured_table", "placement_table", "prediction_table"]

Rows = list[dict[str, Any]]

# of measured rows: by the rates known before, and by those fitted to the rows
PREDICTIONS = ("predicted_ms", "fitted_ms")


def placement_table(rows: Rows) -> str:
    """Ours against the targets and the bounds, a line a number of ranks."""
    lines = [
        "  CP | balance mean (worst)   target         bound | received mean (worst)    target   bound    gap"
        " | plan ms (target)"
    ]
    for row in rows:
        if "least_received" in row:
            lines.append(_placement_line(row))
    return "\n".join(lines)


def _placement_line(row: dict[str, Any]) -> str:
    level, worst, share, limit = TARGETS.get(row["ranks"], (None, None, None, None))
    bound = row["least_received"]
    gap = f"{row['needed'] / bound - 1:+.0%}" if bound else ""
    target = f"{level:.2f}" + (f" ({worst:.2f})" if worst else "") if level else ""
    within = f" ({limit:g})" if limit else ""
    return (
        f"{row['ranks']:>4} | {row['balance']:.4f} ({row['worst_balance']:.4f})   {target:<11} "
        f"{row['least_balance']:.4f} | {row['needed']:.4f} ({row['worst_needed']:.4f})   "
        f"{f'{share:.3f}' if share else '':>8}  {bound:.4f}  {gap:>5} | {row['plan_ms']:8.1f}{within}"
    )


def prediction_table(rows: Rows) -> str:
    """What every placement and exchange takes, ours and others', a line each."""
    crossing = any("across_one_level_mb" in row for row in rows)
    lines = [
        f"  CP | {'':<40} attention  exchange  not hidden     total  efficiency  received   sent"
        "  two levels  parts" + ("  MB across: one level  two levels" if crossing else "")
    ]
    for row in rows:
        name = label(row)
        lines.append(
            f"{row['ranks']:>4} | {name:<40} {row['attention_ms']:>9.2f} {row['exchange_ms']:>9.2f} "
            f"{row['not_hidden_ms']:>11.2f} {row['total_ms']:>9.2f} {row['efficiency']:>11.1%} "
            f"{row['received']:>9.3f} {row['sent']:>6.3f}" + _levels(row)
        )
    return "\n".join(lines)


def _levels(row: dict[str, Any]) -> str:
    """The share of windows in which two levels are taken, parts of heads, and megabytes that cross nodes in
    one level and in two.
    """
    taken = f"{row['two_levels']:>12.0%} {row['head_parts']:>6.1f}" if "two_levels" in row else ""
    if "across_one_level_mb" not in row:
        return taken
    return f"{taken}  {row['across_one_level_mb']:>20.1f} {row['across_two_levels_mb']:>11.1f}"


def label(row: dict[str, Any]) -> str:
    """A row's name in tables and charts."""
    if row["name"] != "ours":
        return row["name"]
    return f"ours: {row['placement']}, {row['exchange']}"


def measured_table(rows: Rows) -> str:
    """Measured rows; with a prediction, it and how far it is off."""
    return "\n".join([_MEASURED_HEADER, *map(measured_line, rows)])


_MEASURED_HEADER = (
    f"  CP  heads  window   | {'':<27} attention  exchange  hidden     total  efficiency  balance  received"
    " | predicted    off    fitted    off"
)


def measured_line(row: dict[str, Any]) -> str:
    """A measured row."""
    off = " ".join(
        f"{row[name]:>9.2f} {row[name] / row['total_ms'] - 1:>+6.1%}" for name in PREDICTIONS if name in row
    )
    columns = (("attention_ms", 9), ("exchange_ms", 9), ("hidden_ms", 7))
    times = " ".join(_or_dash(row, name, width) for name, width in columns)
    shares = f"{_or_dash(row, 'balance', 8, 3)} {_or_dash(row, 'received', 9, 3)}"
    return (
        f"{row['ranks']:>4} {row['heads']:>6}  {row['workload']:<8} | {label(row):<27} {times} "
        f"{row['total_ms']:>9.2f} {row['efficiency']:>11.1%} {shares} | {off}"
    )


def _or_dash(row: dict[str, Any], name: str, width: int, digits: int = 2) -> str:
    return f"{row[name]:>{width}.{digits}f}" if row.get(name) is not None else "-".rjust(width)
