"""How a run fares: what went wrong and was survived, and when it is too much.

    step 7: gradient not finite, skipped (1 in a row)      weights, optimizer and schedule stay as they were
    step 8: ... (2 in a row), step 9: ... (3 in a row)     the run ends, with the documents of step 9
    written out

Counts travel in the checkpoint, so that the summary at the end is of the whole run and not of its last start.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.config import Config
from anchor_megatron.data.packing import WindowDataset

__all__ = ["Counts", "Diverged", "Health", "write_outcome"]

_log = logging.getLogger(__name__)

_REMEMBERED = 10_000  # reports that the percentiles are of


class Diverged(RuntimeError):
    """Too many steps in a row without a finite gradient."""


@dataclass
class Counts:
    """Of the whole run, restarts included."""

    skipped: int = 0
    restarts: int = 0
    failed_saves: int = 0
    rewinds: int = 0
    skipped_batches: int = 0  # global batches that rewinds left out: step s takes batch s + skipped_batches


@dataclass
class Health:
    """Judges each step. The same on every rank, as all of it is agreed."""

    config: Config
    windows: WindowDataset
    counts: Counts = field(default_factory=Counts)
    bad_in_a_row: int = 0
    steps: int = 0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on counting from what a checkpoint kept."""
        known = {entry.name for entry in dataclasses.fields(Counts)}
        self.counts = Counts(**{name: int(value) for name, value in state.items() if name in known})
        self.counts.restarts += 1

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return dataclasses.asdict(self.counts)

    def judge(self, step: int, *, updated: bool, speak: bool) -> None:
        """Takes in step `step`; Diverged after `train.max_bad_steps` without an update. speak: say what
        happens.
        """
        self.steps += 1
        self.bad_in_a_row = 0 if updated else self.bad_in_a_row + 1
        if updated:
            return
        self.counts.skipped += 1
        limit = self.config.train.max_bad_steps
        message = (
            f"step {step}: loss or gradient not finite; the update is skipped ({self.bad_in_a_row} in a row, "
            f"{limit} end the run)"
        )
        ends = self.bad_in_a_row >= limit
        if speak:
            _log.warning("%s; %s", message, self._write_documents(step))
        if ends:
            raise Diverged(message)

    def spike(self, step: int, why: str, *, speak: bool) -> None:
        """Takes in that the loss of `step` is a spike; Diverged after `train.max_rewinds` rewinds."""
        limit = self.config.train.max_rewinds
        message = (
            f"step {step}: {why} ({self.counts.rewinds} rewinds before, after {limit} a spike ends the run)"
        )
        if speak:
            _log.warning("%s; %s", message, self._write_documents(step))
        if self.counts.rewinds >= limit:
            raise Diverged(message)

    def rewind(self, step: int, to: int) -> None:
        """Counts that the run goes on from step `to`, with the global batch behind that of `step`."""
        self.counts.rewinds += 1
        self.counts.skipped_batches += step - to
        self.bad_in_a_row = 0

    def summary(self, stalls: list[float]) -> dict[str, Any]:
        """Figures of the run for its end. stalls: seconds that steps waited for each checkpoint."""
        rates = np.percentile(list(self.rates), [5, 50, 95]).tolist() if self.rates else [0.0] * 3
        return {
            "steps": self.steps,
            **dataclasses.asdict(self.counts),
            "saves": len(stalls),
            "save_stall_seconds": round(sum(stalls), 3),
            "longest_save_stall_seconds": round(max(stalls, default=0.0), 3),
            "tokens_per_second_p5_p50_p95": [round(rate, 1) for rate in rates],
        }

    def _write_documents(self, step: int) -> str:
        """The windows and documents of the step, to a file beside the checkpoints; where they are."""
        size, batch = self.config.train.global_batch_size, step + self.counts.skipped_batches
        windows = range((batch - 1) * size, batch * size)
        ids = {n: sorted({int(one) for one in self.windows[n].document_ids if one >= 0}) for n in windows}
        if self.config.checkpoint.directory is None:
            return f"documents by window: {ids}"
        path = Path(self.config.checkpoint.directory) / f"bad_step_{step:07d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"step": step, "data": self.config.data.train, "documents_by_window": ids})
        )
        return f"its documents are in {path}"


def write_outcome(config: Config, outcome: dict[str, Any]) -> None:
    """`outcome.json` in the checkpoints' folder, for the script that started the run."""
    if config.checkpoint.directory is None:
        return
    path = Path(config.checkpoint.directory) / "outcome.json"
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(outcome, indent=1) + "\n")
    aside.replace(path)
