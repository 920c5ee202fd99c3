"""Measures preprocessing, beside the tokenizer library alone and a plain loop, and on one long document.

    python benchmarks/bench_preprocess.py [--megabytes 90] [--workers 2] [--vocabulary 32768] [--json FILE]

Text: the Python standard library's sources as JSONL, cut or repeated to `--megabytes`. In turn, each in a
process of its own and timed behind its imports: tools/preprocess_data.py; the tokenizer library on the same
texts in memory, in one call with as many threads; and one process that reads a line, encodes it and adds it
to Megatron-Core's builder, document by document, as Megatron-LM's tool does. Then one document of 10 million
tokens, with the largest resident memory of the tool's processes. Medians. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import tokenizers

from anchor_megatron.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
LONG_TOKENS = 10_000_000


def main() -> int:
    """0 where the tool makes 0.9 of the library and 1.5 of the loop, and a worker stays under 1 GiB."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=90, help="of text (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "preprocess.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-preprocess-") as name:
        folder = Path(name)
        texts = library_texts(given.megabytes * 10**6)
        train_tokenizer(texts[:1000], vocab_size=given.vocabulary, folder=folder / "tokenizer")
        with (folder / "text.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        figures = measure_speed(folder, given) | measure_long(folder, texts, given)
    figures |= {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
    }
    given.json.write_text(json.dumps(figures, indent=2) + "\n")
    for key, value in figures.items():
        print(f"{key:36} {value if isinstance(value, list | str) else f'{value:,.2f}'}")
    small = max(figures["long_document_worker_gib"]) < 1
    return 0 if figures["of_library"] >= 0.9 and figures["of_loop"] >= 1.5 and small else 1


def library_texts(size: int) -> list[str]:
    """Sources of the standard library, about `size` characters in all."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    own = (path.read_text(errors="ignore") for path in paths if "site-packages" not in path.parts)
    texts: list[str] = []
    for text in itertools.cycle([text for text in own if text and "\0" not in text]):
        texts.append(text)
        size -= len(text)
        if size <= 0:
            return texts
    raise AssertionError("a cycle ends only where the standard library has no sources")


def measure_speed(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All three in turn: the machine is not equally fast all the time."""
    tool, library, loop = [], [], []
    for _ in range(given.repeats):
        tool.append(run_tool(folder, "text.jsonl", given.workers)[:2])
        library.append(run_other(_LIBRARY, folder, given.workers))
        loop.append(run_other(_LOOP, folder, 1))
    assert len({tokens for tokens, _ in tool + library + loop}) == 1, "all make the same tokens"
    speeds = {name: [speed for _, speed in runs] for name, runs in
              (("tool", tool), ("library", library), ("loop", loop))}  # fmt: skip
    middle = {name: statistics.median(all_of) for name, all_of in speeds.items()}
    return {
        "tokens": tool[0][0],
        "workers": given.workers,
        **{f"{name}_tokens_per_second": speed for name, speed in middle.items()},
        "of_library": middle["tool"] / middle["library"],
        "of_loop": middle["tool"] / middle["loop"],
        **{f"all_{name}_tokens_per_second": all_of for name, all_of in speeds.items()},
    }


def measure_long(folder: Path, texts: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """One document of over 10 million tokens, beside the others."""
    parts = itertools.cycle(texts)
    text = "".join(itertools.takewhile(_until(LONG_TOKENS * 5), parts))
    with (folder / "long.jsonl").open("w") as file:
        file.write(json.dumps({"text": text}) + "\n")
        file.writelines(json.dumps({"text": one}) + "\n" for one in texts[:200])
    _, speed, memory = run_tool(folder, "long.jsonl", given.workers)
    longest = json.loads((folder / "out.json").read_text())["longest"]
    assert longest >= LONG_TOKENS, longest
    return {
        "long_document_tokens": longest,
        "long_document_tokens_per_second": speed,
        "long_document_reader_gib": memory[0],
        "long_document_worker_gib": memory[1:],
    }


def _until(characters: int) -> Any:
    left = characters

    def more(text: str) -> bool:
        nonlocal left
        left -= len(text)
        return left > 0

    return more


def run_tool(folder: Path, name: str, workers: int) -> tuple[int, float, list[float]]:
    """Tokens, tokens a second as the tool tells (from the start of its workers to the last byte written), and
    the largest memory seen of the process that reads and of its workers, in GiB.
    """
    tool = str(ROOT / "tools" / "preprocess_data.py")
    words = [str(folder / name), "--tokenizer", str(folder / "tokenizer")]
    words += ["--output", str(folder / "out"), "--workers", str(workers), "--overwrite"]
    with subprocess.Popen([sys.executable, tool, *words], stdout=subprocess.PIPE, text=True) as process:
        largest: dict[int, int] = {}
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended since; looked at 50 ms ago
                watched = psutil.Process(process.pid)
                for one in [watched, *watched.children()]:
                    largest[one.pid] = max(largest.get(one.pid, 0), one.memory_info().rss)
            time.sleep(0.05)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0, printed
    tokens, speed = re.findall(r"([\d,]+) tokens(?:/s)?,", printed)
    memory = [largest.pop(process.pid), *sorted(largest.values())[-workers:]]
    return int(tokens.replace(",", "")), float(speed.replace(",", "")), [one / 2**30 for one in memory]


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

_LOOP = """
import json, sys, time
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer/tokenizer.json")
started = time.perf_counter()
builder = IndexedDatasetBuilder(sys.argv[1] + "/loop.bin", dtype=np.uint16)
tokens = 0
for line in open(sys.argv[1] + "/text.jsonl"):
    ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    builder.add_item(torch.tensor(ids))
    builder.end_document()
    tokens += len(ids)
builder.finalize(sys.argv[1] + "/loop.idx")
print(tokens, tokens / (time.perf_counter() - started))
"""


def run_other(program: str, folder: Path, threads: int) -> tuple[int, float]:
    """Tokens, and tokens a second of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(folder)],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAYON_NUM_THREADS": str(threads)},
    )  # fmt: skip
    tokens, speed = done.stdout.split()[-2:]
    return int(tokens), float(speed)


if __name__ == "__main__":
    sys.exit(main())
