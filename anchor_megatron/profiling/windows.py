"""Windows to simulate and to measure: documents drawn from a file of lengths.

The file is a table of how many documents have which lengths (`benchmarks/document_lengths.csv`), or has one
length a line, of which lengths are drawn with equal chances.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anchor_megatron.testing.lengths import draw_lengths

__all__ = ["draw_window"]


def draw_window(path: Path, *, tokens: int, longest: int, seed: int) -> np.ndarray:
    """Borders int64 [D+1] of documents that fill `tokens`, none beyond `longest`; the last is cut to fit.

    ValueError, naming the file and the line, for what is neither kind of file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of document lengths, got none there")
    lines = path.read_text().split("\n")
    if lines[0].startswith("range,"):
        lengths = draw_lengths(path, tokens=tokens, longest=longest, seed=seed)
    else:
        lengths = _draw_plain(_numbers(path, lines), tokens, longest, seed)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _numbers(path: Path, lines: list[str]) -> np.ndarray:
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            if not line.strip().isdigit() or int(line) < 1:
                raise ValueError(f"{path}, line {number}: got {line!r}, expected a length of at least 1")
            found.append(int(line))
    if not found:
        raise ValueError(f"{path}: expected document lengths, got an empty file")
    return np.array(found)


def _draw_plain(known: np.ndarray, tokens: int, longest: int, seed: int) -> np.ndarray:
    known = np.minimum(known, longest)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(0, dtype=np.int64)
    while drawn.sum() < tokens:
        drawn = np.append(drawn, generator.choice(known, size=int(tokens / known.mean()) + 1))
    count = int(np.searchsorted(np.cumsum(drawn), tokens)) + 1
    drawn = drawn[:count]
    drawn[-1] -= drawn.sum() - tokens
    return drawn
