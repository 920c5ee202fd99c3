"""A rank's plan and tokens on their way to the device: one integer buffer, one copy, views.

A loader worker flattens a plan's arrays, the tokens, labels, loss mask and positions into one int32 buffer
(`PackedArrays`). The training loop pins it, copies it in one non-blocking transfer and cuts it into views
again. Sizes travel beside it as Python integers, so nothing ever has to be read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anchor_megatron.layout.plan import Plan

__all__ = ["PackedArrays", "PlanTensors", "plan_arrays", "plan_tensors"]


@dataclass(frozen=True)
class PackedArrays:
    """Named integer arrays in one int32 buffer; `names` and `sizes` in its order."""

    buffer: Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def pack(cls, arrays: dict[str, np.ndarray]) -> PackedArrays:
        """Flattens one-dimensional arrays; ValueError naming one whose values do not fit into int32."""
        for name, array in arrays.items():
            if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
                raise ValueError(
                    f"{name}: got values from {array.min()} to {array.max()}, expected int32's range"
                )
        flat = np.concatenate([array.astype(np.int32, copy=False) for array in arrays.values()])
        return cls(torch.from_numpy(flat), tuple(arrays), tuple(array.size for array in arrays.values()))

    def pin_memory(self) -> PackedArrays:
        """The same arrays in page-locked memory (called by torch's DataLoader in its pinning thread)."""
        return PackedArrays(self.buffer.pin_memory(), self.names, self.sizes)

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """One non-blocking copy to `device`; int32 views of it by name."""
        moved = self.buffer.to(device, non_blocking=True)
        return dict(zip(self.names, moved.split(self.sizes), strict=True))


@dataclass(frozen=True)
class PlanTensors:
    """`layout.plan.Plan` with its index arrays as int32 tensors on the device; fields mean what they mean
    there.
    """

    local_tokens: int
    cu_seqlens_local: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor
    send_index: Tensor
    gradient_offsets: Tensor
    gradient_sources: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    max_seqlen_local: int
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def received_tokens(self) -> int:
        """Key/value rows that other ranks send to this one."""
        return sum(self.recv_counts)


_ARRAYS = ("cu_seqlens_local", "cu_seqlens_q", "cu_seqlens_k", "key_index", "send_index")


def plan_arrays(plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of `plan` that the device needs, and where every row's gradients come from (see `rows.py`).

    Gradients of K gathered keys and of S sent rows lie one after another; row i, own or received, is the sum
    of those at gradient_sources[gradient_offsets[i] : gradient_offsets[i+1]].
    """
    rows = plan.token_index.size + sum(plan.recv_counts)
    homes = np.concatenate([plan.key_index, plan.send_index])
    sources = np.argsort(homes, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(homes, minlength=rows))])
    arrays = {name: getattr(plan, name) for name in _ARRAYS}
    return arrays | {"gradient_offsets": offsets, "gradient_sources": sources}


def plan_tensors(plan: Plan, arrays: dict[str, Tensor]) -> PlanTensors:
    """The device form of `plan` from its numbers and the moved arrays (int32)."""
    return PlanTensors(
        local_tokens=plan.local_tokens,
        send_counts=plan.send_counts,
        recv_counts=plan.recv_counts,
        max_seqlen_local=plan.max_seqlen_local,
        max_seqlen_q=plan.max_seqlen_q,
        max_seqlen_k=plan.max_seqlen_k,
        cu_seqlens_local=arrays["cu_seqlens_local"],
        cu_seqlens_q=arrays["cu_seqlens_q"],
        cu_seqlens_k=arrays["cu_seqlens_k"],
        key_index=arrays["key_index"],
        send_index=arrays["send_index"],
        gradient_offsets=arrays["gradient_offsets"],
        gradient_sources=arrays["gradient_sources"],
    )
