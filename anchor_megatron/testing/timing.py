"""Results as JSON, with where and when they were measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "write_results"]


def environment() -> dict[str, Any]:
    """Device, date and the versions that matter to a measurement."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "megatron-core", "transformer-engine", "flash-attn-4", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"date": datetime.date.today().isoformat(), "device": device, "versions": versions}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` with the environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment() | results, indent=1) + "\n")
