"""A training pass (forward, backward, gradient reduction) of a few layers, ours beside stock Megatron-Core.

    python tools/bench_step.py --output benchmarks/results/step_1gpu.json
    torchrun --nproc-per-node 2 tools/bench_step.py --output benchmarks/results/step_cp2.json

Stock is Megatron-Core's own GPTModel with TransformerEngine layers and attention and its fused cross entropy:
full attention, and intra-document (THD). Time is the slowest rank's median, memory the largest rank's peak.
The optimizer's step, the same on all sides, is left out: at 131,072 tokens its state and stock's logits do
not fit one GPU together.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformer_engine.pytorch  # noqa: F401  # isort: skip (before anything that touches cuDNN)
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from anchor_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, model_config
from anchor_megatron.model.builder import padded_vocab_size, transformer_config
from anchor_megatron.testing.lengths import workload_lengths
from anchor_megatron.testing.models import random_window
from anchor_megatron.testing.timeline import draw_timeline, overlap, trace
from anchor_megatron.testing.timing import write_results
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.setup import initialize_ranks
from anchor_megatron.training.step import build_model_in_ddp, finalize_gradients, forward_step

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "document_lengths.csv"
ROWS = ("ours, anchor", "stock, intra-document THD", "stock, full attention")


def main() -> None:
    """Runs every row in its own model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-3-8b", help="model shape (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of it (%(default)s)")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of the window (%(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size; context takes the rest")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--timeline", type=Path, metavar="PNG", help="draw one pass of ours, as the profiler saw it"
    )
    given = parser.parse_args()
    config = configuration(given)
    initialize_ranks(config)
    lengths = workload_lengths("file", given.tokens, table=TABLE)
    rows = []
    for name in given.rows:
        model, step = {ROWS[0]: ours, ROWS[1]: stock_documents, ROWS[2]: stock_full}[name](config, lengths)
        rows.append({"name": name} | measure(name, model, step, given))
        del model, step
        gc.collect()
        torch.cuda.empty_cache()
    if given.output and dist.get_rank() == 0:
        write_results(
            given.output,
            vars(given) | {"output": None, "timeline": None, "ranks": dist.get_world_size(), "rows": rows},
        )
    dist.destroy_process_group()


def configuration(given: argparse.Namespace) -> Config:
    """The run's shape and layout."""
    model: ModelConfig = model_config({"preset": given.preset, "num_layers": given.layers})
    context = int(os.environ.get("WORLD_SIZE", "1")) // given.tensor
    return Config(
        model=model,
        data=DataConfig(train="unused", seq_length=given.tokens),
        parallel=ParallelConfig(context=context, tensor=given.tensor, sequence=given.tensor > 1),
    )


Step = Callable[[Any, Any], Any]  # Megatron-Core's forward_step_func


def ours(config: Config, lengths: np.ndarray) -> tuple[Any, Step]:
    """AnchorAttention; the batch is planned once, as loader workers do it ahead of time."""
    assert config.model.vocab_size is not None
    window = random_window(lengths=lengths.tolist(), vocab_size=config.model.vocab_size, seed=0)
    batch = plan_batch(
        [window], mode="anchor", placement="document", context_parallel_size=config.parallel.context,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
    )  # fmt: skip
    pinned: PlannedBatch = batch.pin_memory()
    return build_model_in_ddp(config)[0], lambda _, model: forward_step([], iter([pinned]), model)


def stock_documents(config: Config, lengths: np.ndarray) -> tuple[Any, Step]:
    """Megatron-Core's packed sequences; documents are padded to what its context parallelism asks."""
    import transformer_engine_torch as extension

    ranks = config.parallel.context
    unit = 2 * ranks if ranks > 1 else 1
    plain = np.maximum(lengths - 1, 1)
    padded = -(-plain // unit) * unit
    borders, padded_borders = (
        torch.from_numpy(np.concatenate([[0], np.cumsum(x)])).int().cuda() for x in (plain, padded)
    )
    total = int(padded.sum())
    rank = parallel_state.get_context_parallel_rank()
    held = (
        extension.thd_get_partitioned_indices(padded_borders, total, ranks, rank).long()
        if ranks > 1
        else None
    )
    longest = int(padded.max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, cu_seqlens_q_padded=padded_borders,
        cu_seqlens_kv_padded=padded_borders, max_seqlen_q=longest, max_seqlen_kv=longest,
    )  # fmt: skip
    tokens = total if held is None else held.numel()
    return stock_model(config), stock_step(config, tokens, packed)


def stock_full(config: Config, lengths: np.ndarray) -> tuple[Any, Step]:
    """Megatron-Core's causal attention over the whole window."""
    tokens = config.data.seq_length // config.parallel.context
    return stock_model(config), stock_step(config, tokens, None)


def stock_model(config: Config) -> Any:
    """Megatron-Core's GPTModel as it comes."""
    megatron = transformer_config(config)
    megatron.cross_entropy_loss_fusion, megatron.cross_entropy_fusion_impl = True, "te"
    megatron.finalize_model_grads_func = finalize_gradients
    gpt = GPTModel(
        config=megatron,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.data.seq_length,
        position_embedding_type="rope",
        rotary_base=int(config.model.rotary_base),
        share_embeddings_and_output_weights=False,
    ).cuda()
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
    )
    return DistributedDataParallel(megatron, ddp, Float16Module(megatron, gpt))


def stock_step(config: Config, tokens: int, packed: PackedSeqParams | None) -> Step:
    """Random tokens of this rank through the stock model; the loss is summed over tokens as ours is."""
    assert config.model.vocab_size is not None
    ids = torch.randint(0, config.model.vocab_size, (1, tokens), device="cuda")
    positions = torch.arange(tokens, device="cuda")[None]

    def report(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = losses.float().sum()
        return total, torch.tensor(tokens, device="cuda", dtype=torch.int), {}

    def step(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(ids, positions, None, labels=ids, packed_seq_params=packed), partial(report)

    return step


def measure(name: str, model: Any, step: Step, given: argparse.Namespace) -> dict[str, Any]:
    """Times one row and prints it."""

    def run() -> None:
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=None, model=[model], num_microbatches=1,
            seq_length=given.tokens, micro_batch_size=1, forward_only=False,
        )  # fmt: skip

    times = []
    torch.cuda.reset_peak_memory_stats()
    for repeat in range(2 + given.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        model.zero_grad_buffer()
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    figures = torch.tensor(
        [statistics.median(times), torch.cuda.max_memory_allocated() / 2**30], device="cuda"
    )
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    ms, peak = figures.tolist()
    say(f"{name:<30} {ms:9.1f} ms   peak {peak:6.1f} GiB")
    row = {"ms": ms, "peak_gib": peak}
    if given.timeline and name == ROWS[0]:
        model.zero_grad_buffer()
        row |= draw(run, given.timeline)
    return row


def draw(run: Callable[[], None], path: Path) -> dict[str, Any]:
    """Traces one pass; draws it on the first rank."""
    kernels, waits = trace(run)
    exchange, hidden = overlap(kernels)
    say(
        f"exchange {exchange:.2f} ms, under attention {hidden:.2f} ms; "
        f"the host waited: {dict(waits) or 'never'}"
    )
    if dist.get_rank() == 0:
        draw_timeline(kernels, path, title=f"one pass, rank 0 of {dist.get_world_size()}")
    return {"exchange_ms": exchange, "exchange_under_attention_ms": hidden, "host_waits": dict(waits)}


def say(text: str) -> None:
    """Prints on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
