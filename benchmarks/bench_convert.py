"""Converts a random checkpoint both ways under an address-space limit and compares the speed with a plain
copy.

    python benchmarks/bench_convert.py [--gigabytes 4] [--limit-gib 2.5] [--folder DIR] [--json FILE]

Every conversion is a process of its own with RLIMIT_AS set, as a user would start it. The copy is `cp` of the
same files on the same disk. Each is the median of five, taken in turn; its input is read once just before, so
that all of them find it in the page cache, and its time ends when what it wrote is on the disk: a write into
the page cache is ten times as fast until the kernel's limit of unwritten pages stops it, which would make the
ratio one of chance. What comes back must be the same bytes. Prints a table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from anchor_megatron.convert.families import FAMILIES
from anchor_megatron.convert.hf_config import read_model
from anchor_megatron.convert.mapping import entries, hf_shapes
from anchor_megatron.convert.rows import TensorRows, same_values
from anchor_megatron.convert.safetensors_writer import SafetensorsWriter, TensorInfo
from anchor_megatron.convert.sources import open_source

ROOT = Path(__file__).parents[1]
REPEATS = 5
ROWS = 4096  # drawn at a time


def main() -> int:
    """0 where the memory, the speed and the bytes are as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--limit-gib", type=float, default=2.5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made, and removed again")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=arguments.folder) as name:
        figures = measure(Path(name), arguments.gigabytes, int(arguments.limit_gib * 2**30))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print_table(figures)
    fast = all(figures[way]["of_copy"] >= 0.6 for way in ("import", "export"))
    return 0 if fast and figures["same_bytes"] else 1


def measure(folder: Path, gigabytes: float, limit: int) -> dict[str, Any]:
    """All figures; bytes, seconds, bytes a second."""
    hf, megatron, back, copy = (folder / name for name in ("hf", "megatron", "back", "copy"))
    largest = make_checkpoint(hf, int(gigabytes * 1e9))
    size = sum(path.stat().st_size for path in hf.iterdir())
    ways = {
        "import": (["import", "--hf", str(hf), "--out", str(megatron)], hf, megatron),
        "export": (["export", "--megatron", str(megatron), "--out", str(back)], megatron, back),
    }
    runs: dict[str, list[dict[str, Any]]] = {"copy": [], "import": [], "export": []}
    for _ in range(REPEATS):  # in turn: a virtual machine's disk and memory are not equally fast all the time
        seconds = timed_copy(hf, copy)
        runs["copy"].append({"seconds": seconds, "bytes_per_second": size / seconds})
        for way, (words, source, out) in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            settle(source)
            runs[way].append(convert(words, limit))
    figures: dict[str, Any] = {"bytes": size, "largest_tensor_bytes": largest, "address_space_limit": limit}
    for way, found in runs.items():
        figures[way] = sorted(found, key=lambda run: run["seconds"])[len(found) // 2]
        figures[way]["all_seconds"] = [run["seconds"] for run in found]
        figures[way]["of_copy"] = figures[way]["bytes_per_second"] / figures["copy"]["bytes_per_second"]
    figures["same_bytes"] = same_tensors(hf, back)
    return figures


def make_checkpoint(folder: Path, size: int) -> int:
    """A Llama of 8B's width with random bf16 weights, of at least `size` bytes; its largest tensor."""
    description: dict[str, Any] = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=4096,
        intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
        rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=8192, torch_dtype="bfloat16",
        tie_word_embeddings=size < 3e9,
    )  # fmt: skip
    while True:
        model = read_model(description)
        shapes = hf_shapes(list(entries(FAMILIES["llama"], model)))
        tensors = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
        sizes = [torch.Size(shape).numel() * 2 for shape in shapes.values()]
        if sum(sizes) >= size:
            break
        description["num_hidden_layers"] += 1
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    writer = SafetensorsWriter(folder, tensors, shard_bytes=2 * 10**9)
    for name, shape in shapes.items():
        for start in range(0, shape[0], ROWS):
            rows = min(ROWS, shape[0] - start)
            values = TensorRows(torch.randn(rows, *shape[1:]).bfloat16())
            writer.write(name, start, values, 0, rows)
    writer.finish()
    return max(sizes)


def settle(source: Path) -> None:
    """The same start for all: nothing left to write, `source` in the page cache."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def timed_copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy. Its last goes only now, as a conversion's does: freed blocks write faster."""
    shutil.rmtree(target, ignore_errors=True)
    settle(source)
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    return time.perf_counter() - begun


def convert(words: list[str], limit: int) -> dict[str, Any]:
    """One conversion under the limit: its seconds until all is on the disk, its process's seconds, memory."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "tools/convert_checkpoint.py", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended = time.perf_counter()
    os.sync()
    flushing = time.perf_counter() - ended
    if status:
        raise RuntimeError(f"convert_checkpoint.py {' '.join(words)} failed:\n{errors}")
    done = re.search(r": ([\d.]+) GB in ([\d.]+) s", output)
    assert done is not None, f"expected a summary, got {output}"
    return {
        "seconds": float(done[2]) + flushing,
        "unflushed_seconds": float(done[2]),
        "bytes_per_second": float(done[1]) * 1e9 / (float(done[2]) + flushing),
        "process_seconds": ended - begun,
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }


def same_tensors(first: Path, second: Path) -> bool:
    """Whether both checkpoints hold the same names and bytes."""
    sources = [open_source(first), open_source(second)]
    ours, theirs = (source.tensors for source in sources)
    return ours.keys() == theirs.keys() and all(same_values(ours[name], theirs[name]) for name in ours)


def print_table(figures: dict[str, Any]) -> None:
    """The figures for reading."""
    print(f"{figures['bytes'] / 1e9:.2f} GB, largest tensor {figures['largest_tensor_bytes'] / 1e9:.2f} GB, "
          f"address space limited to {figures['address_space_limit'] / 2**30:.2f} GiB")  # fmt: skip
    print("| | MB/s | of the copy | seconds | process seconds | peak resident MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    copy = figures["copy"]
    print(f"| cp -r | {copy['bytes_per_second'] / 1e6:.0f} | 1.00 | {copy['seconds']:.1f} | | |")
    for way in ("import", "export"):
        run = figures[way]
        print(f"| {way} | {run['bytes_per_second'] / 1e6:.0f} | {run['of_copy']:.2f} | {run['seconds']:.1f} "
              f"| {run['process_seconds']:.1f} | {run['peak_resident_bytes'] / 2**20:.0f} |")  # fmt: skip
    print(f"the same bytes came back: {'yes' if figures['same_bytes'] else 'NO'}")


if __name__ == "__main__":
    sys.exit(main())
