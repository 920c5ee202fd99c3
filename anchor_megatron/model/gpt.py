"""Megatron-Core's GPTModel with rotary angles from explicit positions and a loss that never holds all logits.

GPTModel gives its rotary module a sequence length and lets it count; under context parallelism it also
assumes zigzag shards. Here positions are data: `position_ids` [1, T] goes in, and an override of
`_preprocess` puts the angles where the rotary module's would have been, on every pipeline stage. An override
of `_postprocess` takes the loss from the hidden states (see `loss.py`) where labels are given; without labels
the logits come out as ever.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.model.loss import summed_cross_entropy, token_cross_entropy
from anchor_megatron.model.rotary import RotaryAngles

__all__ = ["AnchorGPT", "fits_fused_rotary"]

_log = logging.getLogger(__name__)

_ROTARY_SLOT, _PADDING_SLOT = 1, 5  # of the tuple that GPTModel._preprocess returns


def fits_fused_rotary(config: TransformerConfig, rows: int) -> bool:
    """Whether TransformerEngine's rotary kernel can turn the keys of `rows` tokens where they lie, among
    queries and values: it counts elements in 32 bits, and beyond that reads and writes elsewhere (seen with
    2.11).

    Megatron-Core's own rotary, which takes the kernel's place, rounds more often (docs/precision.md).
    """
    heads = config.num_attention_heads + 2 * (config.num_query_groups or config.num_attention_heads)
    fits = rows * (heads // config.tensor_model_parallel_size) * (config.kv_channels or 0) < 2**31
    if not fits:
        _warn_of_length(rows)
    return fits


@functools.cache
def _warn_of_length(rows: int) -> None:
    _log.warning("%d tokens a rank: too long for the fused rotary kernel, taking Megatron-Core's own", rows)


class AnchorGPT(GPTModel):
    """A GPTModel whose `position_ids` are honoured; with `labels` and `loss_mask` [1, T] it returns the
    summed loss.

    `vocab_size` is the padded one, `real_vocab_size` the tokenizer's: entries between take no probability.
    """

    def __init__(self, *args: Any, inverse_frequencies: Tensor, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rotary_angles = RotaryAngles(inverse_frequencies)
        self._fused_rotary = self.config.apply_rope_fusion
        self.real_vocab_size = real_vocab_size

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        found = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        found[_ROTARY_SLOT] = self.rotary_angles(position_ids[0])
        self.config.apply_rope_fusion = self._fused_rotary and fits_fused_rotary(
            self.config, position_ids.shape[1]
        )
        padding_mask = found[_PADDING_SLOT]
        # the first stage has sharded it; Megatron-Core 0.16.1 forgets the others
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            whole = padding_mask.t().contiguous()
            found[_PADDING_SLOT] = scatter_to_sequence_parallel_region(whole, group=self.pg_collection.tp).t()
        return tuple(found)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        assert loss_mask is not None, "labels come with a loss_mask"
        group = self.pg_collection.tp
        if self.config.sequence_parallel:  # its backward sums the ranks' shares of the gradient
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return summed_cross_entropy(
            hidden_states[:, 0],
            self.output_weight,
            labels[0],
            loss_mask[0],
            vocab_size=self.real_vocab_size,
            group=group,
        )

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight [V, D] of this tensor-parallel rank, on the last pipeline stage."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def hidden_states(self, tokens: Tensor, positions: Tensor, packed_seq_params: PlannedSeqParams) -> Tensor:
        """What the output layer takes, [T, D], for tokens and positions [1, T]: evaluation picks the rows
        whose logits it needs. One pipeline stage, no sequence parallelism.
        """
        assert self.pre_process and self.post_process and not self.config.sequence_parallel, (
            "evaluation runs on one pipeline stage without sequence parallelism"
        )
        found = self._preprocess(
            input_ids=tokens, position_ids=positions, packed_seq_params=packed_seq_params
        )
        hidden = self.decoder(
            hidden_states=found[0],
            attention_mask=None,
            rotary_pos_emb=found[_ROTARY_SLOT],
            packed_seq_params=packed_seq_params,
        )
        return hidden[:, 0]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, real_vocab_size] of a few rows of hidden states, equal on all tensor-parallel ranks."""
        part = hidden_TD @ self.output_weight.t()
        whole = gather_from_tensor_model_parallel_region(part, group=self.pg_collection.tp)
        return whole[:, : self.real_vocab_size]

    def token_losses(self, hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
        """Cross entropy of every row, fp32 [T], equal on all tensor-parallel ranks."""
        return token_cross_entropy(
            hidden_TD,
            self.output_weight,
            labels_T,
            vocab_size=self.real_vocab_size,
            group=self.pg_collection.tp,
        )
