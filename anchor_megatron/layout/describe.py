"""A plan in words and as a picture: who holds what, who waits for what, who sends what to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.layout.placement import Placement, balance, piece_areas
from anchor_megatron.layout.plan import Plan, make_plans

__all__ = ["describe_plans", "draw_plans", "spans"]


def describe_plans(placement: Placement, positions: np.ndarray) -> str:
    """The plans of all ranks as text that can be checked by hand; `positions` int64 [T] of every token."""
    plans = make_plans(placement)
    lines = [
        f"{placement.cu_seqlens[-1]} tokens, {placement.cu_seqlens.size - 1} documents, "
        f"{placement.context_parallel_size} ranks of {plans[0].token_index.size} tokens; "
        f"balance {balance(placement):.3f} (largest attention area over the mean)"
    ]
    for rank, plan in enumerate(plans):
        waiting = plan.token_index.size - plan.local_tokens
        lines.append(
            f"\nrank {rank}: area {plan.area}, {plan.local_tokens} rows attend at once, "
            f"{waiting} wait for {sum(plan.recv_counts)} rows"
        )
        lines += _piece_lines(placement, rank, positions)
        lines += _send_lines(plan)
    return "\n".join(lines)


def _piece_lines(placement: Placement, rank: int, positions: np.ndarray) -> list[str]:
    """One line a piece of `rank`, in the order of its rows: local pieces, then waiting ones."""
    first = placement.cu_seqlens[placement.document]
    areas = piece_areas(placement)
    mine = np.flatnonzero(placement.rank == rank)
    is_local = placement.start[mine] == first[mine]
    lines, row = [], 0
    for piece in np.concatenate([mine[is_local], mine[~is_local]]):
        start, stop, begin = placement.start[piece], placement.stop[piece], first[piece]
        waits = f"waits: keys {begin}-{stop} from {_holders(placement, piece)}"
        lines.append(
            f"  rows {row:>4}-{row + stop - start:<4}  document {placement.document[piece]}, "
            f"its tokens {start - begin}-{stop - begin} "
            f"(window {start}-{stop}, positions {spans(positions[start:stop])})  "
            f"{'local' if start == begin else waits}  area {areas[piece]}"
        )
        row += int(stop - start)
    return lines


def _send_lines(plan: Plan) -> list[str]:
    """One line a rank that is sent rows, naming their window tokens."""
    lines, begin = [], 0
    for destination, count in enumerate(plan.send_counts):
        if count:
            tokens = plan.token_index[plan.send_index[begin : begin + count]]
            lines.append(f"  sends {count} rows to rank {destination}: window {spans(tokens)}")
        begin += count
    return lines


def _holders(placement: Placement, piece: int) -> str:
    """Ranks that hold the keys of a waiting piece, and how many of them."""
    same = (placement.document == placement.document[piece]) & (placement.start <= placement.start[piece])
    counts = np.bincount(placement.rank[same], weights=(placement.stop - placement.start)[same])
    return ", ".join(f"rank {rank} ({int(count)})" for rank, count in enumerate(counts) if count)


def spans(values: np.ndarray) -> str:
    """0 5 6 7 -> "0, 5-8" (half-open runs)."""
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    runs = np.split(values, breaks)
    return ", ".join(f"{run[0]}" if run.size == 1 else f"{run[0]}-{run[-1] + 1}" for run in runs if run.size)


def draw_plans(placement: Placement, path: Path) -> None:
    """Draws a PNG: the window on top, a lane a rank below it, beside it the rows each rank sends each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = placement.context_parallel_size
    figure, (lanes, traffic) = plt.subplots(
        1, 2, figsize=(14, 2.2 + 0.45 * ranks), width_ratios=[3.4, 1], layout="constrained"
    )
    plans = make_plans(placement)
    colours = [plt.get_cmap("tab20" if ranks > 10 else "tab10")(rank % 20) for rank in range(ranks)]
    _draw_lanes(lanes, placement, plans, colours)
    _draw_traffic(traffic, np.array([plan.send_counts for plan in plans]))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_lanes(axes: Any, placement: Placement, plans: list[Plan], colours: list[Any]) -> None:
    """The window's pieces, coloured by rank, and each again in its rank's lane."""
    first = placement.cu_seqlens[placement.document]
    for start, stop, begin, rank in zip(placement.start, placement.stop, first, placement.rank, strict=True):
        width, hatch = stop - start, None if start == begin else "////"
        bar = dict(left=start, color=colours[rank])
        axes.barh(0, width, height=0.8, **bar)
        axes.barh(rank + 1.5, width, height=0.7, edgecolor="black", linewidth=0.6, hatch=hatch, **bar)
    for border in placement.cu_seqlens:
        axes.axvline(border, color="black", linewidth=0.5, alpha=0.5)
    mean = sum(plan.area for plan in plans) / len(plans)
    labels = [f"rank {rank}  (area {plan.area / mean:.2f})" for rank, plan in enumerate(plans)]
    axes.set_yticks([0, *(np.arange(len(plans)) + 1.5)], ["window", *labels])
    axes.invert_yaxis()
    axes.set(
        xlim=(0, placement.cu_seqlens[-1]),
        xlabel="token of the window (lines: documents; hatched: waits for keys)",
        title=f"Who holds what; balance {balance(placement):.3f}",
    )


def _draw_traffic(axes: Any, sent: np.ndarray) -> None:
    """`sent` int [ranks, ranks]: rows from (down) and to (across) every rank, in numbers up to 16 ranks."""
    ranks = range(len(sent))
    axes.imshow(sent, cmap="Blues", vmin=0, vmax=max(1, sent.max()))
    for (source, destination), count in np.ndenumerate(sent if len(sent) <= 16 else sent[:0]):
        colour = "white" if count > sent.max() / 2 else "black"
        axes.text(destination, source, count, ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="to rank", ylabel="from rank", title="Key/value rows sent", xticks=ranks, yticks=ranks)
