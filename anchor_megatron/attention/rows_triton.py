"""The row movements of `rows.py` as Triton kernels: one program a row and tensor, each byte read and written
once.

Legend: T rows of this rank, R received rows, K gathered keys, S sent rows, G key/value heads, H head dim; E =
G * H elements. W rows of outputs, of which Q are mixed with others, N query heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_home", "gather_keys", "mix_rows", "pack_rows", "sum_received"]


@triton.jit
def _gather(
    k, v, received, index, out_k, out_v, tokens, k_row, k_group, v_row, v_group, out_row,
    H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = own[index[row]], or received[index[row] - tokens]; program axis 1 chooses keys or values."""
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = tl.load(index + row).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside, is_own = e < E, source < tokens
    if which == 0:
        own, out = k + source * k_row + (e // H) * k_group + e % H, out_k
    else:
        own, out = v + source * v_row + (e // H) * v_group + e % H, out_v
    far = received + ((source - tokens) * 2 + which) * E + e
    value = tl.where(
        is_own, tl.load(own, mask=inside & is_own), tl.load(far, mask=inside & (source >= tokens))
    )
    tl.store(out + row * out_row + e, value, mask=inside)


@triton.jit
def _sum(
    dkeys, dvalues, arrived, offsets, sources, out_k, out_v, gathered, begun, out_row,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = (out[row] where row < begun) + the sum of the row's sources, below `gathered` dkeys, then
    arrived.
    """
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    if (row >= begun) | (last > first):
        e = tl.arange(0, BLOCK)
        inside = e < E
        if which == 0:
            out, near = out_k + row * out_row + e, dkeys
        else:
            out, near = out_v + row * out_row + e, dvalues
        total = tl.load(out, mask=inside & (row < begun), other=0.0).to(tl.float32)
        for i in range(first, last):
            source = tl.load(sources + i).to(tl.int64)
            if source < gathered:
                total += tl.load(near + source * E + e, mask=inside, other=0.0).to(tl.float32)
            else:
                far = arrived + ((source - gathered) * 2 + which) * E + e
                total += tl.load(far, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(out_k.dtype.element_ty), mask=inside)


@triton.jit
def _mix(
    out, part, index, keep, new, keep_head, keep_row, new_head, new_row,
    H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[index[row]] = keep[row] * out[index[row]] + new[row] * part[row]; no index: out[row]."""
    row = tl.program_id(0).to(tl.int64)
    to = row
    if index is not None:
        to = tl.load(index + row).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside, head = e < E, e // H
    old_share = tl.load(keep + head * keep_head + row * keep_row, mask=inside)
    new_share = tl.load(new + head * new_head + row * new_row, mask=inside)
    old = tl.load(out + to * E + e, mask=inside)
    added = tl.load(part + row * E + e, mask=inside).to(tl.float32)
    tl.store(out + to * E + e, old_share * old + new_share * added, mask=inside)


def pack_rows(k_TGH: Tensor, v_TGH: Tensor, received_R2GH: Tensor, index_S: Tensor, out_S2GH: Tensor) -> None:
    """See `rows.pack_rows`."""
    _launch_gather(k_TGH, v_TGH, received_R2GH, index_S, out_S2GH[:, 0], out_S2GH[:, 1])


def gather_keys(
    k_TGH: Tensor, v_TGH: Tensor, received_R2GH: Tensor, index_K: Tensor
) -> tuple[Tensor, Tensor]:
    """See `rows.gather_keys`."""
    keys, values = (k_TGH.new_empty((index_K.numel(), *k_TGH.shape[1:])) for _ in range(2))
    _launch_gather(k_TGH, v_TGH, received_R2GH, index_K, keys, values)
    return keys, values


def sum_received(
    dkeys_KGH: Tensor,
    dvalues_KGH: Tensor,
    arrived_S2GH: Tensor,
    offsets: Tensor,
    sources: Tensor,
    out_R2GH: Tensor,
) -> None:
    """See `rows.sum_received`."""
    into = (out_R2GH[:, 0], out_R2GH[:, 1])
    _launch_sum(dkeys_KGH, dvalues_KGH, arrived_S2GH, offsets, sources, into, begun=0)


def add_home(
    dk_TGH: Tensor,
    dv_TGH: Tensor,
    dkeys_KGH: Tensor,
    dvalues_KGH: Tensor,
    arrived_S2GH: Tensor,
    offsets: Tensor,
    sources: Tensor,
    begun: int,
) -> None:
    """See `rows.add_home`; rows below `begun` are added to, the others written."""
    _launch_sum(dkeys_KGH, dvalues_KGH, arrived_S2GH, offsets, sources, (dk_TGH, dv_TGH), begun=begun)


def mix_rows(
    out_WNH: Tensor, part_QNH: Tensor, index_Q: Tensor | None, keep_NQ: Tensor, new_NQ: Tensor
) -> None:
    """See `rows.mix_rows`."""
    assert out_WNH.is_contiguous() and part_QNH.is_contiguous(), "rows must be contiguous"
    rows, heads, head_dim = part_QNH.shape
    if rows:
        _mix[(rows,)](
            out_WNH, part_QNH, index_Q, keep_NQ, new_NQ, *keep_NQ.stride(), *new_NQ.stride(),
            H=head_dim, E=heads * head_dim, BLOCK=triton.next_power_of_2(heads * head_dim), num_warps=8,
        )  # fmt: skip


def _launch_gather(
    k: Tensor, v: Tensor, received: Tensor, index: Tensor, out_k: Tensor, out_v: Tensor
) -> None:
    elements, rows = k.shape[1] * k.shape[2], index.numel()
    assert k.stride(2) == v.stride(2) == 1, "heads must be contiguous"
    if rows:
        _gather[(rows, 2)](
            k, v, received, index, out_k, out_v, k.shape[0], k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), out_k.stride(0),
            H=k.shape[2], E=elements, BLOCK=triton.next_power_of_2(elements),
        )  # fmt: skip


def _launch_sum(
    dkeys: Tensor,
    dvalues: Tensor,
    arrived: Tensor,
    offsets: Tensor,
    sources: Tensor,
    into: tuple[Tensor, Tensor],
    *,
    begun: int,
) -> None:
    elements, rows = dkeys.shape[1] * dkeys.shape[2], offsets.numel() - 1
    assert into[0].stride() == into[1].stride(), (
        f"got {into[0].stride()} and {into[1].stride()}, expected equal strides"
    )
    if rows:
        _sum[(rows, 2)](
            dkeys, dvalues, arrived, offsets, sources, *into, dkeys.shape[0], begun, into[0].stride(0),
            E=elements, BLOCK=triton.next_power_of_2(elements),
        )  # fmt: skip
