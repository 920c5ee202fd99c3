"""Does context parallelism change what a model says? Its logits on 1, 2, 4, ... ranks, by every exchange.

    torchrun --nproc-per-node 4 tools/compare_logits.py --tokens 4096
    torchrun --nproc-per-node 8 tools/compare_logits.py --checkpoint runs/anchor-64k --tokens 65536

Every size that divides the ranks is compared with one rank and, without a GPU, with the whole model in fp64;
each rank compares its own tokens with one rank's, which it has made itself.
The paper reports logits that differ by 0.75 for zigzag ring attention and by nothing for Ulysses at 32K
tokens in BF16 (arXiv 2411.13476). Differences are of the largest logit; the exit status is 1 where one passes
the bound, so that a script can ask.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchor_megatron import cpu

warnings.simplefilter("ignore")  # Megatron-Core's, about packages that reading does not use
if not torch.cuda.is_available():
    cpu.install()  # before Megatron-Core looks for a GPU, as it does when it is imported

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch import Tensor  # noqa: E402

from anchor_megatron.config import (  # noqa: E402
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    model_config,
)
from anchor_megatron.data.window import Window  # noqa: E402
from anchor_megatron.evaluation.opening import opened  # noqa: E402
from anchor_megatron.layout.exchanges import EXCHANGES  # noqa: E402
from anchor_megatron.layout.modes import MODES  # noqa: E402
from anchor_megatron.layout.placement import PLACEMENTS  # noqa: E402
from anchor_megatron.model.builder import build_model, rank_device  # noqa: E402
from anchor_megatron.model.core_attention import PlannedSeqParams  # noqa: E402
from anchor_megatron.model.gpt import AnchorGPT  # noqa: E402
from anchor_megatron.training.batch import plan_batch  # noqa: E402
from anchor_megatron.training.setup import initialize_ranks  # noqa: E402

BOUNDS = {"bf16": 0.05, "fp32": 1e-4}


def main(words: list[str] | None = None) -> int:
    """Exit status: 0, 1 where logits differ by more than the bound, 2 for what cannot be compared."""
    given = _parser().parse_args(words)
    try:
        rows = compare(given)
    except (ValueError, OSError) as error:
        print(f"compare_logits.py: {error}", file=sys.stderr)
        return 2
    bound = BOUNDS[given.precision] if given.bound is None else given.bound
    if dist.get_rank() == 0:
        print(table(rows))
        if given.output is not None:
            given.output.write_text(json.dumps({"bound": bound, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["difference"] <= bound for row in rows) else 1  # a NaN is not within it


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every number of ranks and exchange: the largest differences, of the largest logit."""
    reference = None
    with model(given, 1) as (gpt, shape):
        window = draw_window(given, shape.vocab_size or 0)
        alone = in_order(*logits(gpt, given, window, size=1, exchange="sparse"))
        if rank_device().type == "cpu":
            reference = in_order(*logits(gpt.double(), given, window, size=1, exchange="sparse"))
    largest = float(alone.abs().max())
    differences = partial(differences_of, alone=alone, reference=reference, largest=largest)
    everything = torch.arange(given.tokens, device=alone.device)
    rows = [{"ranks": 1, "exchange": "none", **differences(alone, everything)}]
    for size in (n for n in range(2, dist.get_world_size() + 1) if dist.get_world_size() % n == 0):
        with model(given, size) as (gpt, shape):
            for exchange in given.exchanges:
                if exchange == "ulysses" and shape.num_attention_heads % size:
                    continue
                own = logits(gpt, given, window, size=size, exchange=exchange)
                rows.append({"ranks": size, "exchange": exchange, **differences(*own)})
    return rows


@contextmanager
def model(given: argparse.Namespace, size: int) -> Iterator[tuple[AnchorGPT, ModelConfig]]:
    """The model on `size` context-parallel ranks; the others hold copies of it."""
    parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(context=size)
    if given.checkpoint is not None:
        ranks = Config(parallel=parallel, train=TrainConfig(global_batch_size=dist_size() // size))
        initialize_ranks(ranks)
        with opened(given.checkpoint, parallel=parallel, precision=given.precision) as found:
            yield found.reader.gpt, found.model
        return
    shape = model_config({"preset": given.preset} if given.preset else {"vocab_size": 1024})
    if given.layers is not None:
        shape.num_layers = given.layers
    config = Config(
        model=shape,
        data=DataConfig(train="unused", seq_length=given.tokens),
        parallel=parallel,
        train=TrainConfig(precision=given.precision, global_batch_size=dist_size() // size, seed=given.seed),
    )
    initialize_ranks(config)
    yield build_model(config).eval(), shape


def dist_size() -> int:
    """Ranks of the job, before there is a process group too."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def draw_window(given: argparse.Namespace, vocab_size: int) -> Window:
    """Random tokens in documents that halve in length: half of the window, a quarter, ..."""
    lengths, left = [], given.tokens
    while left > 64:
        lengths.append(left // 2)
        left -= left // 2
    borders = np.cumsum([0, *lengths, left])
    tokens = np.random.default_rng(given.seed).integers(0, vocab_size, given.tokens)
    none, documents = np.zeros(given.tokens, dtype=bool), np.arange(borders.size - 1)
    return Window(tokens, np.zeros_like(tokens), none, borders, documents, np.zeros_like(documents))


@torch.no_grad()
def logits(
    gpt: AnchorGPT, given: argparse.Namespace, window: Window, *, size: int, exchange: str
) -> tuple[Tensor, Tensor]:
    """The logits [T, V] of this rank's tokens, and which of the window's tokens [T] those are."""
    group = parallel_state.get_context_parallel_group()
    planned = plan_batch(
        [window],
        mode=given.mode,
        placement=given.placement,
        context_parallel_size=size,
        context_parallel_rank=group.rank(),
        exchange=exchange,
        ring_rows=given.ring_rows,
    )
    batch = planned.to(rank_device())
    own = gpt(batch.tokens, batch.positions, None, packed_seq_params=PlannedSeqParams(plan=batch.plan))[0]
    return own[:, : gpt.real_vocab_size], torch.from_numpy(planned.plan.token_index).to(own.device)


def in_order(rows: Tensor, tokens: Tensor) -> Tensor:
    """All of a window's rows, which lie as `tokens` says, in its order."""
    return rows[tokens.argsort()]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    lines = ["  CP  exchange   against one rank   identical   against fp64"]
    for row in rows:
        exact = "-" if row["from_fp64"] is None else f"{row['from_fp64']:.2e}"
        same = "yes" if row["identical"] else "no"
        lines.append(
            f"{row['ranks']:>4}  {row['exchange']:<8} {row['difference']:>18.2e} {same:>11} {exact:>14}"
        )
    return "\n".join(lines)


def differences_of(
    rows: Tensor, tokens: Tensor, *, alone: Tensor, reference: Tensor | None, largest: float
) -> dict[str, Any]:
    """How far the logits of all ranks' tokens are from one rank's and from the fp64 model's, as parts of the
    largest logit; inf where one is NaN.
    """
    found = [largest_difference(rows, tokens, alone)]
    found += [] if reference is None else [largest_difference(rows, tokens, reference)]
    worst = torch.stack(found).nan_to_num(nan=float("inf"))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    difference, *from_fp64 = (worst / largest).tolist()
    return {
        "difference": difference,
        "identical": difference == 0,
        "from_fp64": from_fp64[0] if from_fp64 else None,
    }


def largest_difference(rows: Tensor, tokens: Tensor, whole: Tensor) -> Tensor:
    """Between rows [T, V] and those of a whole table [S, V] that `tokens` [T] names; in parts, for memory."""
    parts = zip(rows.split(1024), tokens.split(1024), strict=True)
    return torch.stack([(one.double() - whole[at].double()).abs().max() for one, at in parts]).max()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="training's, or a Hugging Face folder; else a random model")
    add("--preset", help="shape of the random model (default: a tiny one)")
    add("--layers", type=int, help="layers of the random model")
    add("--tokens", type=int, default=4096, help="of the window (%(default)s)")
    add("--mode", choices=MODES, default="anchor")
    add("--placement", choices=PLACEMENTS, default="document")
    add("--exchanges", nargs="+", choices=EXCHANGES, default=list(EXCHANGES))
    add("--ring-rows", type=int, default=1024, help="rows of a round of ring (%(default)s)")
    add("--precision", choices=list(BOUNDS), default="bf16" if torch.cuda.is_available() else "fp32")
    add("--bound", type=float, help=f"largest difference allowed, of the largest logit (default: {BOUNDS})")
    add("--seed", type=int, default=1, help="of the random weights and tokens")
    add("--output", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
