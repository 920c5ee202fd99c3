"""An RMS norm for Megatron-Core's local layers.

Megatron-Core's own wrapper of torch's RMSNorm refuses sequence parallelism; all it needs is the mark on the
weight that makes Megatron-Core sum its gradient over the tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["RMSNorm"]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron-Core's layer specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (a mark, not a field)
