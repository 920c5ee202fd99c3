"""Charts of a simulation or a measurement, each a self-contained SVG drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from anchor_megatron.profiling.simulate import TARGETS
from anchor_megatron.profiling.table import PREDICTIONS, label

__all__ = ["balance_chart", "bytes_chart", "efficiency_chart", "measured_chart", "time_chart"]

Rows = list[dict[str, Any]]

_STYLES: dict[str, dict[str, Any]] = {
    "ours: document, sparse": dict(color="#0b5fa5", linewidth=2.8, marker="o", zorder=5),
    "ours: document, direct": dict(color="#0b5fa5", linestyle=":", marker="."),
    "ours: document, ring": dict(color="#4a9bd9", marker="s"),
    "ours: document, ulysses": dict(color="#57b8a6", marker="D"),
    "ours: zigzag, sparse": dict(color="#999999", linestyle="--", marker="v"),
    "ours: contiguous, sparse": dict(color="#c4c4c4", linestyle="--", marker="^"),
    "TransformerEngine THD": dict(color="#d1495b", marker="x"),
    "shuffled chunks": dict(color="#edae49", marker="P"),
}


def efficiency_chart(rows: Rows) -> bytes:
    """Efficiency against ranks."""

    def draw(axes: Any) -> None:
        _lines(axes, rows, "efficiency", list(_STYLES))
        axes.set(
            ylabel="efficiency", ylim=(0, 1.02), title="Efficiency: one rank's time / (ranks × slowest rank)"
        )

    return _over_ranks(rows, draw, legend="lower left")


def balance_chart(rows: Rows) -> bytes:
    """Balance against ranks, with the targets."""

    def draw(axes: Any) -> None:
        names = [
            "ours: document, sparse",
            "ours: zigzag, sparse",
            "ours: contiguous, sparse",
            "shuffled chunks",
        ]
        _lines(axes, rows, "balance", names)
        worst = [row for row in rows if "plan_ms" in row]
        axes.plot(
            [row["ranks"] for row in worst], [row["worst_balance"] for row in worst], ":", color="#0b5fa5",
            label="ours, the worst window",
        )  # fmt: skip
        _targets(axes, rows, 0)
        axes.set(ylabel="largest area / mean (log)", yscale="log", title="Balance: 1 is level")
        axes.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        axes.minorticks_off()

    return _over_ranks(rows, draw)


def bytes_chart(rows: Rows) -> bytes:
    """The worst rank's received bytes against ranks, with targets and bounds."""

    def draw(axes: Any) -> None:
        left_out = (
            "ours: zigzag",
            "ours: contiguous",
            "ours: document, ring",
            "ours: document, direct",
        )
        names = [name for name in _STYLES if not name.startswith(left_out)]
        # what ranks need, as targets and bounds have it, without what they merely hand on
        needed = [row | {"received": row.get("needed", row["received"])} for row in rows]
        _lines(axes, needed, "received", names)
        bounds = [row for row in rows if row.get("least_received")]
        axes.plot(
            [row["ranks"] for row in bounds], [row["least_received"] for row in bounds], ":", color="black",
            label="bound: no placement receives less",
        )  # fmt: skip
        _targets(axes, rows, 2)
        axes.set(ylabel="share of a full ring (log)", yscale="log", title="Bytes the worst rank receives")

    return _over_ranks(rows, draw)


def time_chart(rows: Rows) -> bytes:
    """Where the time of three sizes goes, as multiples of an even share of one rank's time."""
    sizes = sorted({row["ranks"] for row in rows})
    picked = sorted({sizes[len(sizes) // 3], sizes[2 * len(sizes) // 3], sizes[-1]})
    names = ["ours: document, sparse", "ours: document, ulysses", "shuffled chunks", "TransformerEngine THD"]

    def draw(axes: Any) -> None:
        at, ticks = 0.0, []
        for ranks in picked:
            for name in names:
                found = [row for row in rows if row["ranks"] == ranks and label(row) == name]
                if found:
                    ideal = found[0]["efficiency"] * found[0]["total_ms"]
                    attention, rest = (found[0][key] / ideal for key in ("attention_ms", "not_hidden_ms"))
                    axes.barh(at, attention, color=_STYLES[name]["color"])
                    axes.barh(at, rest, left=attention, color=_STYLES[name]["color"], alpha=0.45, hatch="///")
                    ticks.append((at, f"{ranks:,}  {name.replace('ours: document, ', 'ours, ')}"))
                    at += 1
            at += 0.6
        axes.set_yticks(*zip(*ticks, strict=True))
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(
            xlim=(0, 4),
            xlabel="1: an even share of one rank's time; hatched: not hidden; cut off at 4",
            title="Where the time goes",
        )

    return _svg(draw)


def measured_chart(rows: Rows) -> bytes:
    """Measured and predicted milliseconds of every row."""

    def draw(axes: Any) -> None:
        names = [f"{row['workload']}, {row['heads']} heads, CP {row['ranks']}, {label(row)}" for row in rows]
        at = np.arange(len(rows))
        colours = [_STYLES.get(label(row), {}).get("color", "#7a7a7a") for row in rows]
        axes.barh(at, [row["total_ms"] for row in rows], color=colours, label="measured")
        for name, colour in zip(PREDICTIONS, ("black", "#a0a0a0"), strict=True):
            found = [(row[name], i) for i, row in enumerate(rows) if name in row]
            if found:
                style = dict(color=colour, markersize=14, label=name.removesuffix("_ms"))
                axes.plot(*zip(*found, strict=True), "|", **style)
        for index, row in enumerate(rows):
            axes.text(
                row["total_ms"], index, f"  {row['total_ms']:.2f} ms, {row['efficiency']:.0%}", va="center"
            )
        axes.set_yticks(at, names)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(
            xlabel="ms forward + backward, slowest rank, and efficiency against one rank", title="Measured"
        )
        axes.legend()

    return _svg(draw, height=1.4 + 0.32 * len(rows), width=11)


def _lines(axes: Any, rows: Rows, figure: str, names: list[str]) -> None:
    for name in names:
        found = [row for row in rows if label(row) == name]
        if found:
            style = {"linewidth": 1.6, "markersize": 5} | _STYLES[name]
            axes.plot([row["ranks"] for row in found], [row[figure] for row in found], label=name, **style)


def _targets(axes: Any, rows: Rows, which: int) -> None:
    ranks = sorted({row["ranks"] for row in rows} & set(TARGETS))
    style: dict[str, Any] = dict(color="#2a9d4a", markersize=16, markeredgewidth=2.5, zorder=6)
    axes.plot(ranks, [TARGETS[n][which] for n in ranks], "_", label="target", **style)


def _over_ranks(rows: Rows, draw: Callable[[Any], None], *, legend: str = "best") -> bytes:
    def drawn(axes: Any) -> None:
        draw(axes)
        sizes = sorted({row["ranks"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel("context-parallel ranks")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, framealpha=0.85, loc=legend)

    return _svg(drawn)


def _svg(draw: Callable[[Any], None], *, height: float = 4.6, width: float = 7.4) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
