"""How long, and in how much memory, a model reads one very long document, and answers behind it.

    torchrun --nproc-per-node 2 tools/bench_read.py --layers 4 --tokens 1048576 --output read_1m.json

Random weights in a published shape, of which a few layers are kept; every rank holds its share of the keys
and values. A check goes with it: the last tokens, read with all the others, must come out as they do when the
cache is attended to (by other code). `difference` is the largest, over the hidden states' largest magnitude.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from anchor_megatron import cpu

if not torch.cuda.is_available():
    cpu.install()

import torch.distributed as dist  # noqa: E402

from anchor_megatron.config import Config, DataConfig, ParallelConfig, TrainConfig, model_config  # noqa: E402
from anchor_megatron.evaluation.reader import Reader  # noqa: E402
from anchor_megatron.model.builder import build_model  # noqa: E402
from anchor_megatron.testing.timing import write_results  # noqa: E402
from anchor_megatron.training.setup import initialize_ranks  # noqa: E402


def main() -> None:
    """Reads, checks, decodes, and writes what was measured."""
    given = _parser().parse_args()
    config = configuration(given)
    initialize_ranks(config)
    reader = Reader(build_model(config))
    assert config.model.vocab_size is not None
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, given.tokens)
    reader.read(tokens[: given.tokens // 64])  # compiles and warms up
    reset_peak()
    started = now()
    last = reader.last_hidden(tokens)
    whole_seconds, whole_peak = now() - started, peak_gib()
    started = now()
    reading = reader.read(tokens[: -reader.group.size()])
    read_seconds = now() - started
    again = reader.continued(reading, tokens[-reader.group.size() :].tolist())
    started = now()
    reader.generate(reading, [tokens[-8:].tolist()], new_tokens=given.answer_tokens)
    decode_seconds = now() - started
    figures = {
        "forward_seconds": whole_seconds,
        "forward_peak_gib": whole_peak,
        "read_seconds": read_seconds,
        "read_peak_gib": peak_gib(),
        "seconds_per_answer_token": decode_seconds / given.answer_tokens,
        "difference": ((last - again).abs().max() / last.abs().max()).item(),
    }
    if dist.get_rank() == 0:
        print(figures, flush=True)
        if given.output:
            write_results(
                given.output, vars(given) | {"output": None, "ranks": dist.get_world_size()} | figures
            )
    now()  # a rank that leaves while another still works can keep NCCL from ending
    dist.destroy_process_group()


def configuration(given: argparse.Namespace) -> Config:
    """The model's shape and layout."""
    return Config(
        model=model_config({"preset": given.preset, "num_layers": given.layers}),
        data=DataConfig(train="unused", seq_length=given.tokens),
        parallel=ParallelConfig(
            context=int(os.environ.get("WORLD_SIZE", "1")) // given.tensor, tensor=given.tensor
        ),
        train=TrainConfig(precision="bf16" if torch.cuda.is_available() else "fp32"),
    )


def now() -> float:
    """Seconds, with all ranks' work done."""
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def reset_peak() -> None:
    """Forgets the warm-up's memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """The largest rank's peak; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device="cuda")
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-3-8b", help="model shape (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of it (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the document (%(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size; context takes the rest")
    parser.add_argument("--answer-tokens", type=int, default=8, help="decoded behind it (%(default)s)")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    return parser


if __name__ == "__main__":
    main()
