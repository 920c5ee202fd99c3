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

from anchor_megatron.attention.kernels import Segments
from anchor_megatron.layout.plan import Plan, Relay, Round, Whole

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
    rounds: tuple[RoundTensors, ...] = ()
    whole: WholeTensors | None = None
    relay: RelayTensors | None = None
    head_parts: tuple[int, int] = (1, 1)

    @property
    def local_segments(self) -> Segments:
        """The local pieces: their keys are their own rows."""
        ends, longest = self.cu_seqlens_local, self.max_seqlen_local
        return Segments(ends, ends, longest, longest)

    @property
    def waiting_segments(self) -> Segments:
        """The waiting pieces: their keys are gathered."""
        return Segments(self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k)

    @property
    def received_tokens(self) -> int:
        """Key/value rows that other ranks send to this one, those that it merely hands on too."""
        return sum(self.recv_counts) + (sum(self.relay.recv_counts) if self.relay is not None else 0)

    @property
    def sent_tokens(self) -> int:
        """Key/value rows that this rank sends."""
        return sum(self.send_counts) + (sum(self.relay.send_counts) if self.relay is not None else 0)


@dataclass(frozen=True)
class RoundTensors:
    """`layout.plan.Round` on the device. `queries` counts its waiting rows; where it has all of them, in
    order, `query_index` is None.
    """

    plan: PlanTensors
    queries: int
    query_index: Tensor | None

    def pick(self, rows: Tensor) -> Tensor:
        """The round's rows [Q, ...] of all waiting ones [W, ...]."""
        return rows if self.query_index is None else rows.index_select(0, self.query_index)

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Writes the round's rows among all waiting ones."""
        if self.query_index is None:
            rows.copy_(values)
        else:
            rows.index_copy_(0, self.query_index.long(), values)

    def add_to(self, rows: Tensor, values: Tensor) -> None:
        """Adds to the round's rows among all waiting ones."""
        if self.query_index is None:
            rows.add_(values)
        else:
            self.put(rows, self.pick(rows) + values)


@dataclass(frozen=True)
class RelayTensors:
    """`layout.plan.Relay` on the device."""

    send_index: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]


@dataclass(frozen=True)
class WholeTensors:
    """`layout.plan.Whole` on the device."""

    segments: Segments
    to_tokens: Tensor
    to_rows: Tensor


_ARRAYS = ("cu_seqlens_local", "cu_seqlens_q", "cu_seqlens_k", "key_index", "send_index")


def plan_arrays(plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of `plan` and its rounds that the device needs, and where every row's gradients come from
    (see `rows.py`).

    Gradients of K gathered keys and of S sent rows (with a relay: of the first all-to-all, then of the
    second) lie one after another; row i, own or received, is the sum of those at
    gradient_sources[gradient_offsets[i] : gradient_offsets[i+1]].
    """
    rows = plan.token_index.size + plan.received_tokens
    passed = [plan.relay.send_index] if plan.relay is not None else []
    homes = np.concatenate([plan.key_index, plan.send_index, *passed])
    sources = np.argsort(homes, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(homes, minlength=rows))])
    arrays = {name: getattr(plan, name) for name in _ARRAYS}
    arrays |= {"gradient_offsets": offsets, "gradient_sources": sources}
    for number, one in enumerate(plan.rounds):
        own = plan_arrays(one.plan) | {"query_index": one.query_index}
        arrays |= {f"{name}/{number}": array for name, array in own.items()}
    if plan.relay is not None:
        arrays["relay/send_index"] = plan.relay.send_index
    if plan.whole is not None:
        arrays |= {
            f"whole/{name}": getattr(plan.whole, name) for name in ("cu_seqlens", "to_tokens", "to_rows")
        }
    return arrays


def plan_tensors(plan: Plan, arrays: dict[str, Tensor]) -> PlanTensors:
    """The device form of `plan` and its rounds from their numbers and the moved arrays (int32)."""
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
        rounds=tuple(_round_tensors(plan, one, arrays, number) for number, one in enumerate(plan.rounds)),
        whole=None if plan.whole is None else _whole_tensors(plan.whole, arrays),
        relay=None if plan.relay is None else _relay_tensors(plan.relay, arrays),
        head_parts=plan.head_parts,
    )


def _relay_tensors(relay: Relay, arrays: dict[str, Tensor]) -> RelayTensors:
    return RelayTensors(arrays["relay/send_index"], relay.send_counts, relay.recv_counts)


def _whole_tensors(whole: Whole, arrays: dict[str, Tensor]) -> WholeTensors:
    ends, longest = arrays["whole/cu_seqlens"], whole.max_seqlen
    segments = Segments(ends, ends, longest, longest)
    return WholeTensors(segments, arrays["whole/to_tokens"], arrays["whole/to_rows"])


def _round_tensors(plan: Plan, one: Round, arrays: dict[str, Tensor], number: int) -> RoundTensors:
    suffix = f"/{number}"
    own = {name.removesuffix(suffix): array for name, array in arrays.items() if name.endswith(suffix)}
    queries, waiting = one.query_index.size, plan.token_index.size - plan.local_tokens
    index = None if queries == waiting else own["query_index"]
    return RoundTensors(plan_tensors(one.plan, own), queries, index)
