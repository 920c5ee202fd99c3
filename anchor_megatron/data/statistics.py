"""How long the documents of a data set are, source by source: as a table, as JSON and drawn.

Documents of 3, 3 and 10 tokens from "web", one of 9 from "code":

    source  documents  tokens  mean  median  90 %  longest
    web             3      16   5.3       3    10       10
    code            1       9   9.0       9     9        9
    all             4      25   6.2       3    10       10

and for each length of LONG the share of the tokens that lies in longer documents. Quantiles are lengths that
occur: the least that this share of the documents does not pass. All of it comes from one table of how many
documents each source has of each length, made in parts of the index: its size is that of the lengths that
occur, not of the documents.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.documents import Documents
from anchor_megatron.data.index import in_parts

__all__ = ["LONG", "LengthStatistics", "Statistics", "corpus_statistics", "write_statistics"]

LONG = (4096, 16_384, 65_536, 131_072)
_LINES = 9  # sources that a chart tells apart; the others are one line


@dataclass(frozen=True)
class LengthStatistics:
    """Of one source's documents, lengths in tokens; zeros where it has none."""

    source: str
    documents: int
    tokens: int
    mean: float
    median: int
    p90: int
    """not passed by 90 % of the documents"""
    longest: int
    share_over: dict[int, float]
    """share of the tokens in documents of more than each of LONG"""


@dataclass(frozen=True)
class Statistics:
    """Of the documents of several sources, and of all together.

    `table` int64 [n, 3] has in each row an entry of `sources`, a length and how many documents it has of it.
    """

    sources: tuple[LengthStatistics, ...]
    all: LengthStatistics
    table: np.ndarray

    def __str__(self) -> str:
        rows = [_HEADER, *(_row(one) for one in (*self.sources, self.all))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]  # numbers to the right
            )
            for row in rows
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "sources": [dataclasses.asdict(one) for one in self.sources],
            "all": dataclasses.asdict(self.all),
        }


def corpus_statistics(corpus: Corpus) -> Statistics:
    """The statistics of all of a corpus's documents, by source."""
    table = _length_table(corpus.lengths, corpus.sources)
    sources = [
        _of_lengths(name, *table[table[:, 0] == number, 1:].T)
        for number, name in enumerate(corpus.source_names)
    ]
    return Statistics(tuple(sources), _of_lengths("all", table[:, 1], table[:, 2]), table)


def write_statistics(prefix: str | Path, folder: Path | None = None) -> Statistics:
    """Statistics of the data set at `prefix`, also written to `folder` (the data set's where None) as
    NAME_statistics.json and NAME_statistics.png.
    """
    found = corpus_statistics(Corpus([Documents(prefix)]))
    base = (Path(prefix).parent if folder is None else folder) / Path(prefix).name
    Path(f"{base}_statistics.json").write_text(json.dumps(found.as_json(), indent=2) + "\n")
    draw_lengths(found, Path(f"{base}_statistics.png"))
    return found


def _length_table(lengths: np.ndarray, sources: np.ndarray) -> np.ndarray:
    width = 1 + max(int(part.max()) for _, part in in_parts(lengths))
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for begin, part in in_parts(lengths):
        of_part = sources[begin : begin + part.size].astype(np.int64) * width + part
        found, number = np.unique(of_part, return_counts=True)
        keys, where = np.unique(np.concatenate([keys, found]), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate([counts, number])).astype(np.int64)
    return np.stack([keys // width, keys % width, counts], axis=1)


def _of_lengths(source: str, lengths: np.ndarray, counts: np.ndarray) -> LengthStatistics:
    """`counts` documents of each of `lengths`, in any order."""
    documents, tokens = int(counts.sum()), int((lengths * counts).sum())
    if not documents:
        return LengthStatistics(source, 0, 0, 0.0, 0, 0, 0, dict.fromkeys(LONG, 0.0))
    order = np.argsort(lengths, kind="stable")
    passed = np.cumsum(counts[order])
    median, p90 = (int(lengths[order][np.searchsorted(passed, documents * share)]) for share in (0.5, 0.9))
    share_over = {long: float((lengths * counts)[lengths > long].sum()) / max(tokens, 1) for long in LONG}
    return LengthStatistics(
        source, documents, tokens, tokens / documents, median, p90, int(lengths.max()), share_over
    )


_HEADER = [
    *("source", "documents", "tokens", "mean", "median", "90 %", "longest"),
    *(f"over {long // 1024}K" for long in LONG),
]


def _row(one: LengthStatistics) -> list[str]:
    numbers = [f"{number:,}" for number in (one.median, one.p90, one.longest)]
    shares = [f"{share:.1%}" for share in one.share_over.values()]
    return [one.source, f"{one.documents:,}", f"{one.tokens:,}", f"{one.mean:,.1f}", *numbers, *shares]


def draw_lengths(statistics: Statistics, path: Path) -> None:
    """Draws a PNG: the shares of each source's documents, and of its tokens, by the documents' length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 4.6), sharex=True, layout="constrained")
    lengths = np.maximum(statistics.table[:, 1], 1)
    bins = np.floor(np.log2(lengths)).astype(int)  # one for each doubling
    edges = 2 ** np.arange(bins.max() + 2)
    documents = statistics.table[:, 2].astype(float)
    for axes, weights, what in zip(
        panels, (documents, documents * statistics.table[:, 1]), ("documents", "tokens"), strict=True
    ):
        for name, numbers in _lines(statistics.sources):
            own = np.isin(statistics.table[:, 0], numbers)
            shares = np.bincount(bins[own], weights=weights[own], minlength=edges.size - 1)
            axes.stairs(shares / max(shares.sum(), 1), edges, label=name, linewidth=1.6)
        axes.set_xscale("log", base=2)
        axes.set_xticks(edges[::2], [_short(edge) for edge in edges[::2].tolist()])
        axes.set_xlim(edges[bins.min()], edges[-1])
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(
            xlabel="length in tokens", ylabel=f"of the source's {what}", ylim=(0, None),
            title=f"Where the {what} are: shares by length, a step a doubling",
        )  # fmt: skip
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, framealpha=0.85)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(count: int) -> str:
    """2048 -> 2K"""
    units = [(1 << 20, "M"), (1 << 10, "K"), (1, "")]
    return next(f"{count // size}{unit}" for size, unit in units if count >= size)


def _lines(sources: Sequence[LengthStatistics]) -> list[tuple[str, list[int]]]:
    """Names and entries of what is drawn as a line: the largest sources, and all others as one."""
    order = sorted((n for n, one in enumerate(sources) if one.documents), key=lambda n: -sources[n].tokens)
    lines = [(sources[number].source, [number]) for number in order[:_LINES]]
    rest = order[_LINES:]
    return lines + ([(f"{len(rest)} others", rest)] if rest else [])
