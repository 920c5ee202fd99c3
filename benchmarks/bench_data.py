"""Measures window assembly, in tokens a second.

    python benchmarks/bench_data.py [--json FILE]

Made-up documents of about 1,000 (and of about 30) tokens in windows of 131,072, in one thread. The start of a
data set: the first window of 1,000,000 documents. Medians of several runs. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from anchor_megatron.data.documents import Documents, Summary
from anchor_megatron.data.packing import WindowDataset

ROOT = Path(__file__).parents[1]
SEQ_LENGTH = 131_072
VOCABULARY = 50_000  # of the made-up documents


def main() -> int:
    """0 where assembly makes over 20 million tokens a second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        figures = {
            "assembly": {
                f"documents of {mean}": measure_assembly(folder / f"set{mean}", mean, given.repeats)
                for mean in (1000, 30)
            },
            "million_documents": measure_start(folder / "million"),
        }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=2) + "\n")
    for part, found in figures.items():
        print(f"{part}\n" + "\n".join(f"    {key:34} {shown(value)}" for key, value in found.items()))
    return 0 if figures["assembly"]["documents of 1000"] > 20e6 else 1


def shown(value: float | list[float]) -> str:
    """A figure as a person reads it."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def make_set(prefix: Path, lengths: np.ndarray) -> Documents:
    """Documents of random tokens."""
    dtype = np.uint16
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, lengths.sum(), dtype=dtype)
    builder.data_file.write(tokens.tobytes())
    builder.sequence_lengths = lengths.tolist()
    builder.document_indices = list(range(lengths.size + 1))
    builder.finalize(f"{prefix}.idx")
    counts = dict(documents=lengths.size, tokens=int(lengths.sum()), longest=int(lengths.max()), empty=0)
    ids = dict(largest_token=VOCABULARY - 1, vocab_size=VOCABULARY, anchor_token=0)
    Summary(**counts, **ids, tokenizer="none", sources=[]).write(Path(f"{prefix}.json"))
    return Documents(prefix)


def draw_lengths(mean: int, documents: int) -> np.ndarray:
    """Log-normal lengths, as those of web text about are, of `mean` tokens."""
    sigma = 1.2
    drawn = np.random.default_rng(1).lognormal(np.log(mean) - sigma**2 / 2, sigma, documents)
    return np.maximum(drawn.astype(np.int64), 1)


def measure_assembly(prefix: Path, mean: int, repeats: int) -> float:
    """Tokens a second over an epoch of about 30 million."""
    windows = WindowDataset(
        make_set(prefix, draw_lengths(mean, 30_000_000 // mean)),
        seq_length=SEQ_LENGTH, anchor_token=0, seed=0,
    )  # fmt: skip
    count = windows.windows_per_epoch(0)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for n in range(count):
            windows[n]
        seconds.append(time.perf_counter() - started)
    return count * SEQ_LENGTH / statistics.median(seconds)


def measure_start(prefix: Path) -> dict[str, float]:
    """Seconds to open a million documents and to have the first window, and a later epoch's first."""
    make_set(prefix, draw_lengths(100, 1_000_000))
    found: dict[str, float] = {}
    for seq_length in (SEQ_LENGTH, 2048):
        started = time.perf_counter()
        windows = WindowDataset(Documents(prefix), seq_length=seq_length, anchor_token=0, seed=0)
        found[f"seconds to open, windows of {seq_length}"] = time.perf_counter() - started
        windows[0]
        found[f"seconds to window 0 of {seq_length}"] = time.perf_counter() - started
    return found


if __name__ == "__main__":
    sys.exit(main())
