"""docs/reliability.md shows what the long form found, and no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_docs_show_what_was_found() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text())
    parts = [part for part in found.values() if isinstance(part, dict) and "rows" in part]
    rows = [f"| {what} | {became} |" for part in parts for what, became in part["rows"]]
    docs = (ROOT / "docs" / "reliability.md").read_text()
    table = re.search(r"\| what was done \| what became of it \|\n\| --- \| --- \|\n((?:\|.*\n)+)", docs)
    assert table is not None and table[1].splitlines() == rows, (
        "docs/reliability.md: copy the lines that tests/faults/long.py prints, expected\n" + "\n".join(rows)
    )
    assert all(part["good"] for part in parts)
