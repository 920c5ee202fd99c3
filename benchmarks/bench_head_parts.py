"""What it costs the attention kernel to be called for some heads after others, as `layout/overlap.py` has it.

    python benchmarks/bench_head_parts.py --output benchmarks/results/head_parts.json

For windows on several numbers of ranks the waiting pieces of the rank with most of them, in 1, 2, 4 and 8
parts of 32 query and 8 key/value heads; medians. Beside them what the calls beyond the first cost by the cost
model. It runs without a GPU too, to be tried out (--tokens-per-rank 256).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine"):
    import transformer_engine.pytorch  # noqa: F401 (before anything that touches cuDNN)

from anchor_megatron.attention.choose import choose_kernel
from anchor_megatron.attention.kernels import Kernel, Segments
from anchor_megatron.attention.plan_tensors import PackedArrays, plan_arrays, plan_tensors
from anchor_megatron.layout.cost import CostModel
from anchor_megatron.layout.overlap import call_seconds, local_and_waiting
from anchor_megatron.layout.placement import place
from anchor_megatron.layout.plan import make_plan
from anchor_megatron.profiling.clock import slowest, timed
from anchor_megatron.profiling.windows import draw_window
from anchor_megatron.testing.timing import write_results

TABLE = Path(__file__).resolve().parent / "document_lengths.csv"
HEADS, GROUPS, HEAD_DIM, SCALE = 32, 8, 128, 128**-0.5


def main() -> None:
    """Prints a line for every size and number of parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cp", type=int, nargs="+", default=[8, 32, 64], help="numbers of ranks (%(default)s)"
    )
    parser.add_argument("--tokens-per-rank", type=int, default=16384, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of which the median counts (%(default)s)")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    given = parser.parse_args()
    rows = [row for ranks in given.cp for row in measure(ranks, given.tokens_per_rank, given.repeats)]
    if given.output:
        write_results(given.output, {"tokens_per_rank": given.tokens_per_rank, "rows": rows})


def measure(ranks: int, tokens_per_rank: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one window."""
    costs, tokens = CostModel(), ranks * tokens_per_rank
    cu_seqlens = draw_window(TABLE, tokens=tokens, longest=tokens // 4, seed=1)
    placement = place("document", cu_seqlens, context_parallel_size=ranks, window_length=tokens, costs=costs)
    _, waiting = local_and_waiting(placement, costs)
    rank = int(waiting.sum(axis=0).argmax())
    plan = make_plan(placement, rank)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    segments = plan_tensors(plan, PackedArrays.pack(plan_arrays(plan)).to(device)).waiting_segments
    kernel = choose_kernel("auto", device=device, dtype=dtype, head_dim=HEAD_DIM)
    queries, keys = plan.token_index.size - plan.local_tokens, plan.key_index.size
    generator = torch.Generator(device=device).manual_seed(1)
    random = partial(torch.randn, device=device, dtype=dtype, generator=generator)
    q, dout = (random(queries, HEADS, HEAD_DIM) for _ in range(2))
    k, v = (random(keys, GROUPS, HEAD_DIM) for _ in range(2))
    found = []
    for parts in (1, 2, 4, 8):
        steps = in_parts(kernel, segments, q, k, v, dout, parts)
        forward, backward = slowest(timed(steps, device=device, repeats=repeats)).tolist()
        row = {"ranks": ranks, "rank": rank, "queries": queries, "keys": keys, "parts": parts,
               "forward_ms": forward, "backward_ms": backward}  # fmt: skip
        more = (parts - 1) * call_seconds(placement, costs)[:, rank] * 1e3
        print(
            f"CP {ranks:>4}, rank {rank}: {queries:,} rows, {keys:,} keys, {parts} parts: "
            f"{forward:.3f} + {backward:.3f} ms; the calls cost {more[0]:.3f} + {more[1]:.3f} by the model",
            flush=True,
        )
        found.append(row)
    return found


def in_parts(
    kernel: Kernel, segments: Segments, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, parts: int
) -> list[Callable[[], None]]:
    """A forward and a backward pass over the heads in so many parts."""
    cut = [tuple(x.chunk(parts, dim=1)) for x in (q, k, v, dout, torch.empty_like(q), torch.empty_like(q))]
    cut[1:3] = [tuple(x.contiguous() for x in some) for some in cut[1:3]]  # as they are gathered
    each = list(zip(*cut, strict=True))
    sums: list[Tensor] = []

    def forward() -> None:
        sums[:] = [
            kernel.forward(query, key, value, segments, scale=SCALE, out_TNH=out)
            for query, key, value, _, out, _ in each
        ]

    def backward() -> None:
        for (query, key, value, dout_, out, dq), lse in zip(each, sums, strict=True):
            into = (dq, torch.empty_like(key), torch.empty_like(value))
            kernel.backward(dout_, query, key, value, out, lse, segments, scale=SCALE, into=into)

    return [forward, backward]


if __name__ == "__main__":
    main()
