"""A plan in words and as a picture: who holds what, who waits for what, who sends what to whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anchor_megatron.layout.placement import Placement, balance, piece_areas
from anchor_megatron.layout.plan import make_plans

__all__ = ["describe_plans", "draw_plans"]


def describe_plans(placement: Placement, positions: np.ndarray) -> str:
    """The plans of all ranks as text that can be checked by hand. `positions` int64 [T] by token of the
    micro-batch.
    """
    plans = make_plans(placement)
    areas = piece_areas(placement)
    first = placement.cu_seqlens[placement.document]
    lines = [
        f"{placement.cu_seqlens[-1]} tokens, {placement.cu_seqlens.size - 1} documents, "
        f"{placement.context_parallel_size} ranks of {plans[0].token_index.size} tokens; balance {balance(placement):.3f} "
        "(largest attention area over the mean)"
    ]
    for rank, plan in enumerate(plans):
        lines.append(f"\nrank {rank}: area {plan.area}, {plan.local_tokens} rows attend at once, "
                     f"{plan.token_index.size - plan.local_tokens} wait for {sum(plan.recv_counts)} rows")  # fmt: skip
        mine = np.flatnonzero(placement.rank == rank)
        is_local = placement.start[mine] == first[mine]
        row = 0
        for piece in np.concatenate([mine[is_local], mine[~is_local]]):
            start, stop, begin = placement.start[piece], placement.stop[piece], first[piece]
            lines.append(
                f"  rows {row:>4}-{row + stop - start:<4}  document {placement.document[piece]}, its tokens "
                f"{start - begin}-{stop - begin} (window {start}-{stop}, positions {_spans(positions[start:stop])})  "
                + (
                    "local"
                    if start == begin
                    else f"waits: keys {begin}-{stop} from {_holders(placement, piece)}"
                )
                + f"  area {areas[piece]}"
            )
            row += int(stop - start)
        for destination, count in enumerate(plan.send_counts):
            if count:
                begin = sum(plan.send_counts[:destination])
                tokens = plan.token_index[plan.send_index[begin : begin + count]]
                lines.append(f"  sends {count} rows to rank {destination}: window {_spans(tokens)}")
    return "\n".join(lines)


def _holders(placement: Placement, piece: int) -> str:
    """Ranks that hold the keys of a waiting piece, and how many of them."""
    same = (placement.document == placement.document[piece]) & (placement.start <= placement.start[piece])
    counts = np.bincount(placement.rank[same], weights=(placement.stop - placement.start)[same])
    return ", ".join(f"rank {rank} ({int(count)})" for rank, count in enumerate(counts) if count)


def _spans(values: np.ndarray) -> str:
    """0 5 6 7 -> "0, 5-8" (half-open runs)."""
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    runs = np.split(values, breaks)
    return ", ".join(f"{run[0]}" if run.size == 1 else f"{run[0]}-{run[-1] + 1}" for run in runs if run.size)


def draw_plans(placement: Placement, path: Path) -> None:
    """Draws the placement as PNG: the window on top, a lane a rank below it, beside it the rows each rank
    sends each.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plans = make_plans(placement)
    ranks = placement.context_parallel_size
    colours = [plt.get_cmap("tab20" if ranks > 10 else "tab10")(rank % 20) for rank in range(ranks)]
    figure, (window, traffic) = plt.subplots(
        1, 2, figsize=(14, 2.2 + 0.45 * ranks), width_ratios=[3.4, 1], layout="constrained"
    )
    first = placement.cu_seqlens[placement.document]
    for start, stop, begin, rank in zip(placement.start, placement.stop, first, placement.rank, strict=True):
        window.barh(0, stop - start, left=start, height=0.8, color=colours[rank])
        window.barh(rank + 1.5, stop - start, left=start, height=0.7, color=colours[rank], edgecolor="black",
                    linewidth=0.6, hatch=None if start == begin else "////")  # fmt: skip
    for border in placement.cu_seqlens:
        window.axvline(border, color="black", linewidth=0.5, alpha=0.5)
    mean = sum(plan.area for plan in plans) / ranks
    labels = [f"rank {rank}  (area {plan.area / mean:.2f})" for rank, plan in enumerate(plans)]
    window.set_yticks([0, *(np.arange(ranks) + 1.5)], ["window", *labels])
    window.invert_yaxis()
    window.set(xlim=(0, placement.cu_seqlens[-1]), xlabel="token of the window (lines: documents; hatched: waits for keys)",
               title=f"Who holds what; balance {balance(placement):.3f}")  # fmt: skip
    sent = np.array([plan.send_counts for plan in plans])
    traffic.imshow(sent, cmap="Blues", vmin=0, vmax=max(1, sent.max()))
    for source in range(ranks if ranks <= 16 else 0):
        for destination in range(ranks):
            dark = sent[source, destination] > sent.max() / 2
            traffic.text(destination, source, sent[source, destination], ha="center", va="center", fontsize=8,
                         color="white" if dark else "black")  # fmt: skip
    traffic.set(
        xlabel="to rank",
        ylabel="from rank",
        title="Key/value rows sent",
        xticks=range(ranks),
        yticks=range(ranks),
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
