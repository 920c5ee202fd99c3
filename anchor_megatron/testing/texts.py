"""Real text that is on every machine, as documents for tests."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

__all__ = ["write_paragraphs"]


def write_paragraphs(path: Path) -> Path:
    """Writes the paragraphs of the standard library's json package to `path`, a line of JSON each."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))
    paragraphs = [part for file in files for part in file.read_text().split("\n\n") if part.strip()]
    path.write_text("\n".join(json.dumps({"text": part}) for part in paragraphs))
    return path
