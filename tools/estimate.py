"""Memory of every rank and time of a run, before it is started.

    python tools/estimate.py examples/extend_128k/llama-3-8b.yaml --ranks 8 --tflops 450
    python tools/estimate.py run.yaml --ranks 64 parallel.tensor=4 parallel.context=8 train.recompute=full

Counted from the configuration: weights and their gradients, the optimizer's shares, activations that the
backward pass needs (what TransformerEngine's layers and our attention keep), one chunk of logits, received
keys and values. Time is the step's operations over --tflops, a rank's measured rate on them (training prints
it). Documents have the lengths of the data set at data.train where it exists, else of
benchmarks/document_lengths.csv, at most a quarter of the window.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from anchor_megatron.config import Config, data_parallel_size, load_config
from anchor_megatron.layout.modes import attention_cu_seqlens
from anchor_megatron.layout.placement import place, received_rows

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "document_lengths.csv"
GIB = 2**30
MICRO_BATCHES = 32  # drawn, for the mean area and the most received keys
LOGITS_CHUNK = 1 << 30  # elements, as in model/loss.py


@dataclasses.dataclass(frozen=True)
class Estimate:
    """GiB of the fullest rank, and seconds."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, by all layers and micro-batches in flight."""
    received: float
    """Keys and values of other ranks, kept with them."""
    backward: float
    """One layer's gradients, or its recomputed activations with them, at the peak."""
    output: float
    """Hidden states, the output weight's gradient in fp32 and a chunk of logits."""
    peak: float
    """Of all these, what stands at once: output's chunk and backward's layer follow each other."""
    tokens_per_step: int
    seconds_per_step: float
    hours: float


def main(words: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for a configuration that cannot run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="laid over the file")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--tflops", type=float, default=450.0, help="of a rank, measured (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    given = parser.parse_intermixed_args(words)
    try:
        config = load_config(given.config, given.overrides)
        found = estimate(config, ranks=given.ranks, tflops=given.tflops)
    except ValueError as error:
        print(f"estimate.py: {error}", file=sys.stderr)
        return 2
    figures = dataclasses.asdict(found)
    for name, value in figures.items():
        unit = {"tokens_per_step": "", "seconds_per_step": "s", "hours": "h"}.get(name, "GiB")
        print(f"{name:<17}{value:>14,.2f} {unit}" if unit else f"{name:<17}{value:>14,}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def estimate(config: Config, *, ranks: int, tflops: float) -> Estimate:
    """The figures of a run on `ranks` ranks, each working at `tflops`.

    ValueError where the ranks do not fit the configuration or the vocabulary's size is not given.
    """
    replicas = data_parallel_size(config, ranks)
    drawn = _document_borders(config)
    weights = _weights(config)
    shards = replicas * config.parallel.context
    size = 2 if config.train.precision == "bf16" else 4
    rows = config.data.seq_length * config.train.micro_batch_size // config.parallel.context
    kept, temporary = _layer_bytes(config, rows, size)
    layers = config.model.num_layers // config.parallel.pipeline
    in_flight = min(config.parallel.pipeline, _micro_batches(config, replicas))
    received = max(_received_bytes(config, one, size) for one in drawn) * layers * in_flight
    if config.train.recompute == "full":
        received /= layers * in_flight
    hidden = rows * config.model.hidden_size * size
    vocabulary = -(-(config.model.vocab_size or 0) // config.parallel.tensor)
    last_weight = vocabulary * config.model.hidden_size
    # the output layer's gradient waits in `size` bytes while the layers run backward
    behind = hidden + last_weight * size
    loss = 2 * hidden + last_weight * 4 + min(LOGITS_CHUNK, rows * vocabulary) * size
    figures = {
        "weights": weights * size,
        "gradients": weights * 4,
        "optimizer": weights * (12 if size == 2 else 8) / shards,
        "activations": kept * layers * in_flight + hidden,
        "received": received,
        "backward": temporary,
        "output": float(loss),
    }
    standing = sum(figures[name] for name in ("weights", "gradients", "optimizer", "activations", "received"))
    # with pipelines the last stage holds the output layer and one micro-batch, the first the most of them
    peak = standing + max(loss, temporary + behind)
    seconds = float(np.mean([_operations(config, one) for one in drawn])) / (ranks * tflops * 1e12)
    return Estimate(
        **{name: value / GIB for name, value in figures.items()},
        peak=peak / GIB,
        tokens_per_step=config.data.seq_length * config.train.global_batch_size,
        seconds_per_step=seconds,
        hours=seconds * config.train.steps / 3600,
    )


def _document_borders(config: Config) -> list[np.ndarray]:
    """Borders of several micro-batches' documents, window after window."""
    window = config.data.seq_length
    if Path(config.data.train + ".idx").is_file():
        from anchor_megatron.data.documents import Documents

        known = Documents(config.data.train).lengths
    else:
        known = np.minimum(_table_lengths(), window // 4)  # as in docs/performance.md
    generator = np.random.default_rng(0)
    found = []
    for _ in range(MICRO_BATCHES):
        borders = [0]
        for end in window * np.arange(1, config.train.micro_batch_size + 1):
            while borders[-1] < end:
                drawn = int(known[generator.integers(known.size)]) + 1
                borders.append(min(borders[-1] + drawn, int(end)))
        found.append(np.array(borders))
    return found


def _table_lengths(count: int = 4096) -> np.ndarray:
    """Lengths drawn from the table, log-uniformly inside its ranges."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    ranges = np.array([[float(bound) for bound in row["range"].strip("[]").split(",")] for row in rows])
    counts = np.array([float(row["number"]) for row in rows])
    generator = np.random.default_rng(0)
    low, high = ranges[generator.choice(counts.size, count, p=counts / counts.sum())].T
    return np.exp(generator.uniform(np.log(np.maximum(low, 1)), np.log(high + 1))).astype(int)


def _heads(config: Config) -> tuple[int, int]:
    """Width of all query heads, and of all key/value heads."""
    model = config.model
    head_dim = model.kv_channels or model.hidden_size // model.num_attention_heads
    return model.num_attention_heads * head_dim, model.num_query_groups * head_dim


def _weights(config: Config) -> float:
    """Entries on the fullest rank: its layers, and the embedding or the output layer (both if one stage)."""
    model, parallel = config.model, config.parallel
    if model.vocab_size is None:
        raise ValueError("model.vocab_size: got null, expected the vocabulary's size")
    queries, keys = _heads(config)
    attention = model.hidden_size * (2 * queries + 2 * keys)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size * (model.num_experts or 1) / parallel.expert
    ends = 1 if parallel.pipeline > 1 or model.tie_embeddings else 2
    vocabulary = ends * model.vocab_size * model.hidden_size
    layers = model.num_layers / parallel.pipeline
    return (layers * (attention + mlp) + vocabulary) / parallel.tensor + layers * 2 * model.hidden_size


def _layer_bytes(config: Config, rows: int, size: int) -> tuple[float, float]:
    """Bytes of one layer, of `rows` tokens: kept for the backward pass, and needed on top while it runs.

    Kept: the inputs and results of both norms (4 D), queries, keys, values, the attention's output and
    log-sum-exp, both halves of the MLP's gate and their product (3 F). On top: the gradients of the latter.
    """
    model, parallel = config.model, config.parallel
    queries, keys = _heads(config)
    experts = model.moe_topk if model.num_experts is not None else 1
    mlp = 3 * model.ffn_hidden_size * experts / parallel.tensor
    norms = 4 * model.hidden_size / (parallel.tensor if parallel.sequence else 1)
    attention = (2 * queries + 2 * keys) / parallel.tensor
    log_sum_exp = 4 * model.num_attention_heads / parallel.tensor
    layer = rows * (size * (norms + attention + mlp) + log_sum_exp)
    temporary = rows * size * mlp
    if config.train.recompute == "full":
        return rows * size * norms / 4, layer + temporary
    if config.train.recompute == "selective":
        return layer - rows * log_sum_exp, temporary
    return layer, temporary


def _received_bytes(config: Config, cu_seqlens: np.ndarray, size: int) -> float:
    """Of one layer, keys and values that the rank with the most of them receives."""
    ranks, window = config.parallel.context, config.data.seq_length
    if ranks == 1:
        return 0.0
    spans = attention_cu_seqlens(config.data.mode, cu_seqlens, window_length=window)
    placed = place(config.attention.placement, spans, context_parallel_size=ranks, window_length=window)
    most = int(received_rows(placed).max())
    return 2.0 * most * _heads(config)[1] / config.parallel.tensor * size


def _micro_batches(config: Config, replicas: int) -> int:
    return config.train.global_batch_size // (config.train.micro_batch_size * replicas)


def _operations(config: Config, cu_seqlens: np.ndarray) -> float:
    """Of a step, recomputed layers included."""
    model, train = config.model, config.train
    queries, keys = _heads(config)
    window = config.data.seq_length
    lengths = np.diff(attention_cu_seqlens(config.data.mode, cu_seqlens, window_length=window))
    area = float((lengths * (lengths + 1) // 2).sum()) / train.micro_batch_size
    experts = model.moe_topk if model.num_experts is not None else 1
    layer = model.hidden_size * (2 * queries + 2 * keys + 3 * model.ffn_hidden_size * experts)
    attention = model.num_layers * 4 * queries * area
    layers = model.num_layers * 2 * layer * window + attention
    output = 2 * model.hidden_size * (model.vocab_size or 0) * window
    passes = 4 if train.recompute == "full" else 3
    selective = attention if train.recompute == "selective" else 0.0
    return train.global_batch_size * (passes * layers + 3 * output + selective)


if __name__ == "__main__":
    sys.exit(main())
