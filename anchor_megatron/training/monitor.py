"""Attention under watch while training: every n steps, a few queries of chosen layers.

    log.precision_interval: 100, log.precision_layers: [0, 15]   ->   every 100 steps, for each of the layers

    precision/layer_0/anchor_share       part of a query's attention on the first token that it sees
    precision/layer_0/largest_logit      of the scores looked at, before the softmax
    precision/layer_0/shift_difference   D: attention that moves when all positions do (0 in exact arithmetic)

Looked at are, in a step's first micro-batch and on every rank, the longest document piece that begins on the
rank, its first `KEYS` tokens at most, and `QUERIES` queries spread over them. So no rank needs another's
keys, and one small all-reduce brings all together. Core attention is given queries and keys that are turned
and rounded already; turning them by `SHIFT` more rounds them once more, so D is of one rounding (that of
`tools/rope_precision.py`, where both sides are rounded by themselves, is about 1.4 times as large).

Legend: T rows of this rank, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.plan_tensors import PlanTensors
from anchor_megatron.config import Config
from anchor_megatron.model.builder import rank_device
from anchor_megatron.model.core_attention import PlannedCoreAttention
from anchor_megatron.model.gpt import AnchorGPT
from anchor_megatron.precision.attention import attention_scores, compare, spread_rows
from anchor_megatron.precision.rope import turn_once

__all__ = ["KEYS", "QUERIES", "SHIFT", "Monitor"]

KEYS, QUERIES, SHIFT = 4096, 32, 100_000


class Monitor:
    """Watches the layers of `log.precision_layers` in every `log.precision_interval`-th step."""

    def __init__(self, config: Config, gpt: AnchorGPT) -> None:
        self.interval, self.gpt = config.log.precision_interval, gpt
        count = config.model.num_layers
        self.layers = config.log.precision_layers or sorted({0, count // 2, count - 1})
        self._found: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[dict[str, float]]:
        """Around a training step (1 is the first): the figures are in the dictionary given once it is over.

        All ranks enter together. The dictionary stays empty in a step that is not watched.
        """
        figures: dict[str, float] = {}
        if not self.interval or step % self.interval:
            yield figures
            return
        hooks = [
            attention.register_forward_pre_hook(functools.partial(self._look, layer), with_kwargs=True)
            for layer, attention in self._attention_layers()
        ]
        try:
            yield figures
        finally:
            for hook in hooks:
                hook.remove()
        figures.update(self._together())

    def _attention_layers(self) -> Iterator[tuple[int, PlannedCoreAttention]]:
        """Chosen layers of this pipeline stage, by their number in the whole model."""
        for layer in self.gpt.decoder.layers:
            if layer.layer_number - 1 in self.layers:
                yield layer.layer_number - 1, layer.self_attention.core_attention

    @torch.no_grad()
    def _look(
        self, layer: int, attention: PlannedCoreAttention, inputs: Any, options: dict[str, Any]
    ) -> None:
        """A hook before core attention; recomputation and later micro-batches pass through."""
        plan: PlanTensors = options["packed_seq_params"].plan
        if layer in self._found or not plan.local_tokens:
            return
        first, length = _longest_piece(plan)
        length = min(length, KEYS)
        rows = spread_rows(length, QUERIES, inputs[0].device)
        q_RNH = inputs[0][first : first + length, 0][rows]
        k_TGH = inputs[1][first : first + length, 0]
        here = attention_scores(q_RNH, k_TGH, rows, scale=attention.scale)
        half = q_RNH.shape[-1] // 2
        angles = self.gpt.rotary_angles(rows.new_full((length,), SHIFT))[:, 0, 0, :half]
        moved = attention_scores(
            turn_once(q_RNH, angles[rows]), turn_once(k_TGH, angles), rows, scale=attention.scale
        )
        weights = here.softmax(dim=-1)
        difference = compare(weights, moved.softmax(dim=-1)).per_key.sum()
        share = weights[:, :, 0].mean(dtype=torch.float64)
        self._found[layer] = torch.stack((share, difference, torch.ones_like(share), here.max().double()))

    def _together(self) -> dict[str, float]:
        """Means over the ranks that had a piece to look at, the maximum of the largest logit."""
        nothing = torch.tensor([0.0, 0.0, 0.0, -torch.inf], dtype=torch.float64, device=rank_device())
        found = torch.stack([self._found.get(layer, nothing) for layer in self.layers])
        self._found = {}
        sums, largest = found[:, :3].contiguous(), found[:, 3].contiguous()
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        figures = {}
        for layer, (share, difference, ranks), logit in zip(
            self.layers, sums.tolist(), largest.tolist(), strict=True
        ):
            if ranks:
                figures[f"precision/layer_{layer}/anchor_share"] = share / ranks
                figures[f"precision/layer_{layer}/largest_logit"] = logit
                figures[f"precision/layer_{layer}/shift_difference"] = difference / ranks
        return figures


def _longest_piece(plan: PlanTensors) -> tuple[int, int]:
    """First row and length of the longest piece whose keys are all local."""
    borders = plan.cu_seqlens_local.tolist()
    lengths = [end - begin for begin, end in zip(borders, borders[1:], strict=False)]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return borders[longest], lengths[longest]
