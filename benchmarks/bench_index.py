"""Measures a data set of very many documents: opening it, looking through its index, a run's first window.

    python benchmarks/bench_index.py [--documents 100000000] [--repeats 3] [--json FILE]

Made up in a temporary folder: log-normal lengths, 1,000 tokens on average, all tokens 0 in a file of holes,
one of ten sources a document. Every measurement is a process of its own, timed from behind its imports, on
files that were just written; `peak` is its largest resident memory, with mapped pages and what imports take
(`imports`). Opening is a median. Exit status 1 where it takes over 2 s or 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_data import draw_lengths
from megatron.core.datasets.indexed_dataset import DType

from anchor_megatron.data.documents import Summary

ROOT = Path(__file__).parents[1]
PART = 1 << 20
SOURCES = 10
VOCABULARY = 128_256

PROGRAM = r"""
import json, re, sys, time
from anchor_megatron.config import data_config
from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.documents import Documents
from anchor_megatron.training.loader import open_windows

figures = {}
def now(stage):
    # getrusage's would begin with that of the process which started this one
    peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20
    figures[stage] = {"seconds": time.perf_counter() - started, "peak_gib": peak}
prefix, last, *overrides = sys.argv[1:]
config = data_config(prefix, ["data.seq_length=131072", *overrides])
started = time.perf_counter()
now("imports")
documents = Documents(prefix)
now("open")
if last != "open":
    documents.lengths
    now("lengths")
    windows = open_windows(config, corpus=Corpus([documents]))
    now("open_windows")
    windows[0]
    now("first_window")
print(json.dumps(figures))
"""


def main() -> int:
    """Prints a table and writes the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="of opening (%(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "index.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-index-") as folder:
        prefix = Path(folder) / "set"
        make_index(prefix, given.documents)
        figures = {
            "documents": given.documents,
            "index_gib": prefix.with_suffix(".idx").stat().st_size / 2**30,
            "opening": measure(prefix, "open", given.repeats),
            "plain": measure(prefix, "first_window", 1),
            "shorter than 64 tokens joined": measure(
                prefix, "first_window", 1, "data.min_document_tokens=64", "data.short_documents=join"
            ),
        }
    for name, found in figures.items():
        if not isinstance(found, dict):
            print(f"{name}: {found:,.2f}")
            continue
        for stage, one in found.items():
            print(f"{name:32} {stage:14} {one['seconds']:8.3f} s {one['peak_gib']:7.2f} GiB")
    given.json.write_text(json.dumps(figures, indent=2) + "\n")
    opened = figures["opening"]["open"]
    return 0 if opened["seconds"] < 2 and opened["peak_gib"] < 2 else 1


def measure(prefix: Path, last: str, repeats: int, *overrides: str) -> dict[str, dict[str, float]]:
    """Seconds from the end of the imports to that of each stage, and the peak so far."""
    found = []
    for _ in range(repeats):
        words = [sys.executable, "-c", PROGRAM, str(prefix), last, *overrides]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        stage: {name: statistics.median(one[stage][name] for one in found) for name in found[0][stage]}
        for stage in found[0]
    }


def make_index(prefix: Path, documents: int) -> None:
    """A data set that is whole, but for its tokenizer, which nothing here opens."""
    lengths = draw_lengths(1000, documents).astype(np.int32)
    size = np.dtype(np.int32).itemsize
    with prefix.with_suffix(".idx").open("wb") as file:
        code = DType.code_from_dtype(np.int32)
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, documents, documents + 1))
        lengths.tofile(file)
        before = 0
        for begin in range(0, documents, PART):
            ends = before + np.cumsum(lengths[begin : begin + PART], dtype=np.int64) * size
            np.append(before, ends[:-1]).tofile(file)
            before = int(ends[-1])
        for begin in range(0, documents + 1, PART):
            np.arange(begin, min(begin + PART, documents + 1)).tofile(file)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(before)
    np.save(f"{prefix}_sources.npy", np.resize(np.arange(SOURCES, dtype=np.uint8), documents))
    Summary(
        documents=documents, tokens=before // size, longest=int(lengths.max()), empty=0, largest_token=0,
        vocab_size=VOCABULARY, anchor_token=0, tokenizer="none", sources=[f"s{n}" for n in range(SOURCES)],
    ).write(prefix.with_suffix(".json"))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
