"""The results' rows made ready for reading: picked, averaged over a model's layers, named, as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from anchor_megatron.precision.experiments import Row, octaves

__all__ = [
    "mean_over_layers",
    "number",
    "pick",
    "profile_per_key",
    "shift_rows",
    "source_title",
    "sources_of",
]


def number(value: float) -> str:
    """Two digits: 0.0026, 1.6, 130, 1.2e-12."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else "none"
    if 0.001 <= abs(value) < 1000:
        return f"{float(f'{value:.2g}'):g}"
    return f"{value:.1e}"


def source_title(results: dict[str, Any], name: str) -> str:
    """Vectors or a model in words."""
    fixed = {"random": "seeded random vectors", "sink": "random vectors with a planted attention sink"}
    return fixed.get(name) or str(results["models"][name])


def mean_over_layers(rows: list[Row], *by: str) -> list[Row]:
    """Rows that agree in `vectors` (a model's layers, "name/3", as "name") and in `by`, as one row of
    means.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["vectors"].split("/")[0], *(row[key] for key in by)), []).append(row)
    return [dict(zip(("vectors", *by), key, strict=True)) | _mean(group, by) for key, group in groups.items()]


def _mean(group: list[Row], by: tuple[str, ...]) -> Row:
    wanted = [key for key, value in group[0].items() if key not in by and not isinstance(value, (str, list))]
    return {key: float(np.mean([row[key] for row in group])) for key in wanted}


def shift_rows(results: dict[str, Any]) -> list[Row]:
    """Shift tests of vectors and of models; of a model's layers the mean, shares being those of the mean
    D.
    """
    rows = []
    every = results["shift"] + results["layers"]
    for row in mean_over_layers(every, "rope", "arithmetic", "shift", "length"):
        same = pick(every, **{key: row[key] for key in ("vectors", "rope", "arithmetic", "shift")})
        profile = np.mean([one["profile"] for one in same], axis=0)
        share = float(profile[0] / profile.sum()) if profile.sum() else float("nan")
        rows.append(row | dict(first_share=share, profile=profile.tolist()))
    return rows


def profile_per_key(row: Row) -> list[float]:
    """D a key in every bin of a row's profile."""
    return (np.array(row["profile"]) / np.diff(octaves(int(row["length"])))).tolist()


def pick(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def sources_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["vectors"] for row in rows))
