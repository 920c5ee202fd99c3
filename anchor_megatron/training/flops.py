"""Floating-point operations of a training step, from the model's shape and the mask's true area.

A matrix product of a token with a weight of n entries takes 2n operations forward and 4n backward. Attention
takes 4 * N * H operations a visible (query, key) pair forward and twice that backward. Recomputation and
everything that is no matrix product are not counted, so the utilisation is of the model's own work.
"""

from __future__ import annotations

import logging
import time

import torch

from anchor_megatron.config import ModelConfig

__all__ = ["peak_tflops", "step_flops"]

# dense bf16 rates by the vendors' data sheets, TFLOP/s
_PEAKS = {
    "A100": 312.0,
    "A800": 312.0,
    "H20": 148.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
}


def step_flops(model: ModelConfig, *, tokens: int, area: int) -> float:
    """Operations of forward and backward for `tokens` rows, with anchors, `area` visible pairs a layer."""
    head_dim = model.kv_channels or model.hidden_size // model.num_attention_heads
    projections = model.hidden_size * head_dim * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    experts = 1 if model.num_experts is None else model.moe_topk
    router = 0 if model.num_experts is None else model.hidden_size * model.num_experts
    mlp = 3 * model.hidden_size * model.ffn_hidden_size * experts + router
    assert model.vocab_size is not None, "the vocabulary's size is filled in before the model is built"
    weights = model.num_layers * (projections + mlp) + model.hidden_size * model.vocab_size
    attention = model.num_layers * 4 * model.num_attention_heads * head_dim
    return 3.0 * (2 * weights * tokens + attention * area)


def peak_tflops(given: float | None) -> float | None:
    """Peak TFLOP/s of one rank: `given`, else the GPU's by its name, else a CPU's measured fp32 matrix
    product.
    """
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return _measured_matmul_tflops()
    name = torch.cuda.get_device_name()
    words = name.replace("-", " ").split()
    for model, peak in _PEAKS.items():
        if model in words:
            return peak
    logging.getLogger(__name__).warning(
        "log.peak_tflops: no known peak for %r, utilisation is not reported", name
    )
    return None


def _measured_matmul_tflops(size: int = 1024) -> float:
    left, right = torch.randn(size, size), torch.randn(size, size)
    left @ right
    times = []
    for _ in range(20):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12
