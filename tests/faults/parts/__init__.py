"""Parts of the fault suite's long form, and what each comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Part:
    """rows: what was done, and what became of it. figures: numbers behind them. good: whether all is well."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    good: bool = True

    def add(self, what: str, found: str, *, ok: bool, **figures: Any) -> None:
        """Takes in a row, prints it, and the figures behind it."""
        self.rows.append((what, found))
        self.figures |= figures
        self.good = bool(self.good and ok)
        print(f"| {what} | {found} |{'' if ok else '    <- NOT AS IT SHOULD BE'}", flush=True)
