"""What a way of packing makes of a data set: documents a window, cut ones, padding, attention areas.

Two windows of 8 rows in mode anchor, of one document and of two of 4, in one global batch: areas 36 and 20,
where full attention has 36. Balance, the largest over the mean, is 36 / 28: so long replicas wait for the one
with the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.layout.modes import attention_cu_seqlens

__all__ = ["PackingReport", "packing_report"]


@dataclass(frozen=True)
class PackingReport:
    """Figures of some consecutive windows, numbers a window: int64 [windows] each.

    pieces   documents, or parts of them   cut      pieces whose document goes on elsewhere
    padding  rows of no document           joined   documents that share an anchor, as they are short
    area     visible (query, key) pairs    dropped  documents left out on the way, as they are short
    """

    seq_length: int
    batch_windows: int
    pieces: np.ndarray
    cut: np.ndarray
    padding: np.ndarray
    joined: np.ndarray
    dropped: np.ndarray
    area: np.ndarray

    def balance(self) -> np.ndarray:
        """Of every whole global batch, its largest area over its mean: float64 [batches]."""
        whole = self.area.size // self.batch_windows * self.batch_windows
        batches = self.area[:whole].reshape(-1, self.batch_windows)
        return batches.max(axis=1) / batches.mean(axis=1)

    def __str__(self) -> str:
        count, full = self.area.size, self.seq_length * (self.seq_length + 1) // 2
        rows = [
            ("", "mean", "least", "10 %", "median", "90 %", "most"),
            _row("pieces of documents a window", self.pieces, "{:,.1f}"),
            _row("attention area, of full attention", self.area / full, "{:.2%}"),
            _row("padding", self.padding / self.seq_length, "{:.2%}"),
        ]
        if self.balance().size:
            rows.append(_row("largest area of a global batch / mean", self.balance(), "{:.2f}"))
        lines = ["  ".join([row[0].ljust(38), *(cell.rjust(8) for cell in row[1:])]) for row in rows]
        lines.append(
            f"{count:,} windows of {self.seq_length:,} rows: {self.pieces.sum():,} pieces, "
            f"{self.cut.sum() / max(self.pieces.sum(), 1):.2%} of them cut, {self.joined.sum():,} documents "
            f"joined, {self.dropped.sum():,} dropped"
        )
        return "\n".join(lines)


def packing_report(windows: WindowDataset, numbers: range, *, mode: str, batch_windows: int) -> PackingReport:
    """Figures of windows `numbers`, packed as training has them, in `mode` and global batches of
    `batch_windows`.
    """
    names = ("pieces", "cut", "padding", "joined", "dropped", "area")
    found: dict[str, list[int]] = {name: [] for name in names}
    for n in numbers:
        window = windows[n]
        for name in names[:-1]:
            found[name].append(getattr(window.counts, name))
        spans = np.diff(attention_cu_seqlens(mode, window.cu_seqlens, window_length=windows.seq_length))
        found["area"].append(int((spans * (spans + 1) // 2).sum()))
    arrays = {name: np.array(values, dtype=np.int64) for name, values in found.items()}
    return PackingReport(windows.seq_length, batch_windows, **arrays)


def _row(name: str, values: np.ndarray, form: str) -> tuple[str, ...]:
    quantiles = np.quantile(values, [0, 0.1, 0.5, 0.9, 1])
    return (name, *(form.format(value) for value in (values.mean(), *quantiles)))
