"""The data sets behind `data.train`: one by its prefix, or several with their shares of the tokens.

    train: data/web                                                        [("data/web", 1.0)]
    train: [{prefix: data/web, weight: 3}, {prefix: data/code, weight: 1}] three tokens of web to one of code

Weights need not sum to anything.
"""

from __future__ import annotations

__all__ = ["data_sets"]


def data_sets(train: object) -> list[tuple[str, float]]:
    """(prefix, weight) of every data set that `data.train` names: a prefix alone, or a list of
    {prefix, weight}; ValueError for anything else.
    """
    if isinstance(train, str):
        return [(train, 1.0)]
    expected = "expected a prefix or a list of {prefix: ..., weight: ...}"
    if not isinstance(train, list) or not train:
        raise ValueError(f"data.train: got {train!r}, {expected}")
    found = []
    for entry in train:
        if not isinstance(entry, dict) or set(entry) != {"prefix", "weight"}:
            raise ValueError(f"data.train: got the entry {entry!r}, {expected}")
        prefix, weight = entry["prefix"], entry["weight"]
        if not isinstance(prefix, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"data.train: got the entry {entry!r}, {expected}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"data.train: got weight {weight} for {prefix}, expected a number above 0")
        found.append((prefix, float(weight)))
    return found
