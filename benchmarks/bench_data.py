"""Measures preprocessing and window assembly, in tokens a second.

    python benchmarks/bench_data.py [--megabytes 30] [--workers 2] [--vocabulary 32768] [--json FILE]

Preprocessing: the Python standard library's sources as JSONL, cut or repeated to `--megabytes`, by
tools/preprocess_data.py with a byte-level BPE trained on them, and beside it the tokenizer library alone on
the same texts in memory, in one call with as many threads. Window assembly: made-up documents of about 1,000
(and of about 30) tokens in windows of 131,072, in one thread. The start of a data set: the first window of
1,000,000 documents. Medians of several runs. Prints a table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from anchor_megatron.data.documents import Documents, Summary
from anchor_megatron.data.packing import WindowDataset
from anchor_megatron.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
SEQ_LENGTH = 131_072
VOCABULARY = 50_000  # of the made-up documents


def main() -> int:
    """0 where preprocessing makes over 1 and window assembly over 20 million tokens a second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=30, help="of text to preprocess (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        figures = {
            "preprocessing": measure_preprocessing(folder, given),
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
    fast = figures["preprocessing"]["tokens_per_second"] > 1e6
    return 0 if fast and figures["assembly"]["documents of 1000"] > 20e6 else 1


def shown(value: float | list[float]) -> str:
    """A figure as a person reads it."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_preprocessing(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The tool and the tokenizer library alone, in turn: the machine is not equally fast all the time."""
    texts = library_texts(given.megabytes * 10**6)
    train_tokenizer(texts[:1000], vocab_size=given.vocabulary, folder=folder / "tokenizer")
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tool, library = [], []
    for _ in range(given.repeats):
        tool.append(run_tool(folder, given.workers))
        library.append(run_library(folder, given.workers))
    tokens, speed, library_speed = (
        tool[0][0],
        *(statistics.median(one for _, one in x) for x in (tool, library)),
    )
    return {
        "tokens": tokens,
        "workers": given.workers,
        "tokens_per_second": speed,
        "library_tokens_per_second": library_speed,
        "of_library": speed / library_speed,
        "all_tokens_per_second": [one for _, one in tool],
        "all_library_tokens_per_second": [one for _, one in library],
    }


def library_texts(size: int) -> list[str]:
    """Sources of the standard library, about `size` characters in all."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    own = (path.read_text(errors="ignore") for path in paths if "site-packages" not in path.parts)
    texts: list[str] = []
    for text in itertools.cycle([text for text in own if text]):
        texts.append(text)
        size -= len(text)
        if size <= 0:
            return texts
    raise AssertionError("a cycle ends only where the standard library has no sources")


def run_tool(folder: Path, workers: int) -> tuple[int, float]:
    """Tokens, and tokens a second as tools/preprocess_data.py tells: from the start of its workers to the
    last byte written.
    """
    tool = str(ROOT / "tools" / "preprocess_data.py")
    words = [str(folder / "text.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    words += ["--output", str(folder / "out"), "--workers", str(workers), "--overwrite"]
    done = subprocess.run([sys.executable, tool, *words], check=True, stdout=subprocess.PIPE, text=True)
    tokens, speed = re.findall(r"([\d,]+) tokens(?:/s)?,", done.stdout)
    return int(tokens.replace(",", "")), float(speed.replace(",", ""))


_LIBRARY = """
import json, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1] + "/text.jsonl")]
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer/tokenizer.json")
started = time.perf_counter()
found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
seconds = time.perf_counter() - started
tokens = sum(len(one) for one in found)
print(tokens, tokens / seconds)
"""


def run_library(folder: Path, threads: int) -> tuple[int, float]:
    """Tokens, and tokens a second of one call of the tokenizer library in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _LIBRARY, str(folder)],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAYON_NUM_THREADS": str(threads)},
    )  # fmt: skip
    tokens, speed = done.stdout.split()
    return int(tokens), float(speed)


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
