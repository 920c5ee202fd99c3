"""Anchor attention beside its peers, forward and backward, on one GPU or several: a table and JSON.

    python tools/bench_attention.py --output benchmarks/results/attention_1gpu.json
    torchrun --nproc-per-node 2 tools/bench_attention.py --output benchmarks/results/attention_cp2.json

TFLOP/s counts the mask's own area only: 4 * heads * head dim a visible pair forward, 2.5 times that backward.
Both sides of every ratio are measured in this run; figures are medians, of several ranks the slowest rank's.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformer_engine.pytorch  # noqa: F401  # isort: skip (before anything that touches cuDNN)
import numpy as np
import torch
import torch.distributed as dist

from anchor_megatron.attention.choose import choose_kernel
from anchor_megatron.layout.cost import LayerShape
from anchor_megatron.profiling.measure import measure_total
from anchor_megatron.testing import peers
from anchor_megatron.testing.lengths import WORKLOADS, workload_lengths
from anchor_megatron.testing.timing import write_results

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "document_lengths.csv"
HEAD_DIM = 128


def main() -> None:
    """Runs every workload and head count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of the window (%(default)s)")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument(
        "--heads", nargs="+", default=["32/8", "64/8"], help="query/key-value heads (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed repeats, of which the median counts")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks > 1:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # as in training
        dist.init_process_group(
            "nccl", device_id=torch.device("cuda", torch.cuda.current_device()), pg_options=options
        )
    rows = []
    for heads in given.heads:
        for workload in given.workloads:
            query_heads, groups = map(int, heads.split("/"))
            lengths = workload_lengths(workload, given.tokens, table=TABLE)
            say(f"\n{workload}: {lengths.size} documents, longest {lengths.max():,}; "
                f"{heads} heads of {HEAD_DIM}; {ranks} GPU(s)")  # fmt: skip
            for name, case in cases(lengths, query_heads, groups, ranks):
                gc.collect()
                torch.cuda.empty_cache()
                rows.append({"workload": workload, "heads": heads, "ranks": ranks, "name": name}
                            | measure(name, case, query_heads, groups, given.repeats))  # fmt: skip
                # each time, so that a run cut short keeps its rows
                if given.output and (ranks == 1 or dist.get_rank() == 0):
                    write_results(given.output, {"tokens": given.tokens, "rows": rows})
    if ranks > 1:
        dist.destroy_process_group()


Case = Callable[[], tuple[Any, int, float]]  # -> attention, tokens of this rank, visible pairs of all ranks


def cases(lengths: np.ndarray, heads: int, groups: int, ranks: int) -> Iterator[tuple[str, Case]]:
    """Name and maker of every implementation. A window's tokens include ours' anchors; peers have none."""
    shape = dict(heads=heads, groups=groups, head_dim=HEAD_DIM)
    kernel = choose_kernel(
        "flash_attention_4", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=HEAD_DIM
    )
    varlen = choose_kernel(
        "torch_varlen", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=HEAD_DIM
    )
    tokens, plain = int(lengths.sum()), np.maximum(lengths - 1, 1)
    if lengths.size == 1:  # one document: the anchor is its own first token in every implementation
        plain = lengths

    def planned(which: np.ndarray, kernel_: Any, group: Any = None) -> Case:
        size = ranks if group is not None else 1

        def make() -> tuple[Any, int, float]:
            plan, held = peers.device_plan(
                which, placement="document", ranks=size, rank=dist.get_rank() if size > 1 else 0
            )
            return peers.ours(plan, kernel_, HEAD_DIM, group), held.size, area(which)

        return make

    if ranks > 1:
        yield "ours", planned(lengths, kernel, dist.group.WORLD)

        def te_cp() -> tuple[Any, int, float]:
            world = dist.group.WORLD
            assert world is not None, "several ranks have a process group"
            attend, held = peers.transformer_engine_thd_cp(plain, group=world, **shape)
            return attend, held.numel(), area(plain)

        yield "TransformerEngine p2p THD", te_cp
        yield "flash-attn 4, one GPU, no anchor", planned(plain, kernel)
        return
    yield "ours", planned(lengths, kernel)
    yield "flash-attn 4, no anchor", planned(plain, kernel)
    yield "FlashAttention-2 (torch varlen), no anchor", planned(plain, varlen)
    yield "TransformerEngine THD, no anchor", lambda: (
        peers.transformer_engine_thd(plain, **shape), int(plain.sum()), area(plain))  # fmt: skip
    if lengths.size > 1:
        yield "FlexAttention, anchor mask", lambda: (
            peers.flex_anchor(plain), int(plain.sum()) + 1, area(plain) + plain.sum() + 1)  # fmt: skip
        yield "full causal, flash-attn 4", planned(np.array([tokens]), kernel)


def area(lengths: np.ndarray) -> float:
    """Visible pairs of causal documents."""
    wide = lengths.astype(np.float64)
    return float((wide * (wide + 1) / 2).sum())


def measure(name: str, case: Case, heads: int, groups: int, repeats: int) -> dict[str, Any]:
    """Times one implementation and prints its row."""
    attend, tokens, pairs = case()
    device = torch.device("cuda", torch.cuda.current_device())
    row = measure_total(attend, tokens, LayerShape(heads, groups, HEAD_DIM), device=device, repeats=repeats)
    alone = "one GPU" in name or not dist.is_initialized()
    flops = 4 * heads * HEAD_DIM * pairs / (1 if alone else dist.get_world_size())
    row["forward_tflops"] = flops / row["forward_ms"] / 1e9
    row["backward_tflops"] = 2.5 * flops / row["backward_ms"] / 1e9
    say(f"  {name:<44} {row['forward_ms']:8.3f} + {row['backward_ms']:8.3f} = {row['total_ms']:8.3f} ms   "
        f"{row['forward_tflops']:5.0f} / {row['backward_tflops']:5.0f} TFLOP/s a GPU")  # fmt: skip
    return row


def say(text: str) -> None:
    """Prints on the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
