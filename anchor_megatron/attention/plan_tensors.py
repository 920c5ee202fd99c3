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
    """Named integer arrays in one int32 buffer. `buffer` int32 [total]; `names` and `sizes` in buffer order."""

    buffer: Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def pack(cls, arrays: dict[str, np.ndarray]) -> PackedArrays:
        """Flattens one-dimensional arrays whose values fit into int32; ValueError naming one that does not."""
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
_NUMBERS = ("local_tokens", "send_counts", "recv_counts", "max_seqlen_local", "max_seqlen_q", "max_seqlen_k")


def plan_arrays(plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of `plan` that the device needs."""
    return {name: getattr(plan, name) for name in _ARRAYS}


def plan_tensors(plan: Plan, arrays: dict[str, Tensor]) -> PlanTensors:
    """The device form of `plan` from its numbers and the moved `arrays` (int32)."""
    return PlanTensors(
        **{name: getattr(plan, name) for name in _NUMBERS}, **{name: arrays[name] for name in _ARRAYS}
    )
