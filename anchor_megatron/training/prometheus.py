"""The newest report as a file in Prometheus' text format.

    {"step": 20, "loss": 2.5, "precision/layer_0/anchor_share": 0.3}    becomes

    # HELP anchor_megatron_loss loss of the newest report
    # TYPE anchor_megatron_loss gauge
    anchor_megatron_loss 2.5                      and so on for the others, / becoming _

Written aside and renamed, as the node exporter's textfile collector reads at any time. No port is opened:
several runs may be at work on a node.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["Prometheus"]


class Prometheus:
    """Replaces `path` with every report. ValueError without the library and for a name without .prom."""

    def __init__(self, path: Path) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            raise ValueError(
                "log.prometheus: given, but the prometheus_client package is not installed"
            ) from error
        if path.suffix != ".prom":
            raise ValueError(f"log.prometheus: got {path}, expected a name that ends in .prom")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.registry = path, CollectorRegistry()
        self.gauges: dict[str, Any] = {}

    def __call__(self, figures: dict[str, Any]) -> None:
        from prometheus_client import Gauge, write_to_textfile

        for name, value in figures.items():
            if value is None:
                continue
            if name not in self.gauges:
                cleaned = "anchor_megatron_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
                self.gauges[name] = Gauge(cleaned, f"{name} of the newest report", registry=self.registry)
            self.gauges[name].set(value)
        write_to_textfile(str(self.path), self.registry)
