"""Megatron-Core's `core_attention`, executing a plan.

The plan travels beside the activations in `PlannedSeqParams`, which Megatron-Core hands from GPTModel.forward
to every layer untouched, also under activation recomputation. Its `qkv_format` is "sbhd", so that
Megatron-Core's own branches for packed ("thd") batches, which know neither pieces nor waiting rows, stay out.

Legend: T rows of this rank, N query heads, G key/value heads (both per tensor-parallel rank), H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels import Kernel
from anchor_megatron.attention.plan_tensors import PlanTensors
from anchor_megatron.model.cache import KeyValueCache

__all__ = ["PlannedCoreAttention", "PlannedSeqParams"]


@dataclass
class PlannedSeqParams(PackedSeqParams):
    """What every layer needs to know of a micro-batch."""

    qkv_format: str = "sbhd"
    plan: PlanTensors | None = None
    cache: KeyValueCache | None = None
    """Where evaluation keeps keys and values: filled where there is a plan, attended to where there is none.
    """


class PlannedCoreAttention(MegatronModule):
    """softmax(q k^T) v of this rank's rows over the plan in `packed_seq_params`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        kernel: Kernel,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        """`softmax_scale` defaults to 1/sqrt(H). Megatron-Core's other arguments describe masks a plan
        already holds.
        """
        super().__init__(config=config)
        self.kernel, self.layer_number = kernel, layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PlannedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """[T, 1, N*H] for query [T, 1, N, H], key and value [T, 1, G, H]. There is no mask: the plan is the
        mask. Without a plan the rows go on behind what the cache holds.
        """
        assert isinstance(packed_seq_params, PlannedSeqParams), (
            f"got packed_seq_params {packed_seq_params!r}, expected PlannedSeqParams"
        )
        plan, cache = packed_seq_params.plan, packed_seq_params.cache
        q_TNH, k_TGH, v_TGH = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan is None:
            assert cache is not None, "got neither a plan nor a cache"
            out_TNH = cache.attend(self.layer_number, q_TNH, k_TGH, v_TGH, scale=self.scale)
            return out_TNH.flatten(1).unsqueeze(1)
        if cache is not None:
            cache.fill(self.layer_number, k_TGH, v_TGH)
        out_TNH = planned_attention(
            q_TNH, k_TGH, v_TGH, plan=plan, kernel=self.kernel, scale=self.scale, group=self.group
        )
        return out_TNH.flatten(1).unsqueeze(1)
