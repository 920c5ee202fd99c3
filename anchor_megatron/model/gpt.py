"""Megatron-Core's GPTModel with rotary angles from explicit positions.

GPTModel gives its rotary module a sequence length and lets it count; under context parallelism it also
assumes zigzag shards. Here positions are data: `position_ids` [1, T] goes in, and one override of
`_preprocess` puts the angles where the rotary module's would have been, on every pipeline stage.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from anchor_megatron.model.rotary import RotaryAngles

__all__ = ["AnchorGPT"]

_ROTARY_SLOT = 1  # of the tuple that GPTModel._preprocess returns


class AnchorGPT(GPTModel):
    """A GPTModel whose `position_ids` are honoured. `vocab_size` is the padded one, `real_vocab_size` the
    tokenizer's.
    """

    def __init__(self, *args: Any, inverse_frequencies: Tensor, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rotary_angles = RotaryAngles(inverse_frequencies)
        self.real_vocab_size = real_vocab_size

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        found = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        found[_ROTARY_SLOT] = self.rotary_angles(position_ids[0])
        return tuple(found)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy per token, [1, T] fp32. Columns that only pad the vocabulary take no probability."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        real_columns = min(max(self.real_vocab_size - first, 0), logits.shape[-1])
        if real_columns < logits.shape[-1]:
            columns: Tensor | None = torch.arange(logits.shape[-1], device=logits.device) >= real_columns
            logits = logits.masked_fill(columns, float("-inf"))
        return super().compute_language_model_loss(labels, logits)
