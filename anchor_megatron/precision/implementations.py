"""The measurements of implementations: of the embedding by itself, and of the attention kernel that training
takes.

    rope_test      turned vectors against FP64, as a multiple of the error of one rounding
    kernel_test    the kernel's output under a shift, and against FP64

Legend: T tokens, N query heads, G key/value heads, R query rows, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anchor_megatron.attention.choose import choose_kernel
from anchor_megatron.attention.kernels import Kernel, Segments
from anchor_megatron.precision.attention import Vectors, spread_rows, weights_of
from anchor_megatron.precision.experiments import Row
from anchor_megatron.precision.rope import EXACT, Rope

__all__ = ["kernel_test", "rope_test"]


def kernel_test(
    vectors: Vectors,
    ropes: Sequence[Rope],
    *,
    reference: int,
    shift: int,
    lengths: Sequence[int],
    rows: int = 16,
) -> list[Row]:
    """The kernel that training takes here, on the first `lengths` tokens, with seeded random values.

    moved: relative change of the whole output under the shift. error: relative departure of the last `rows`
    outputs from FP64. Implementations in BF16 only.
    """
    device = vectors.k_TGH.device
    head_dim = vectors.k_TGH.shape[-1]
    kernel = choose_kernel("auto", device=device, dtype=torch.bfloat16, head_dim=head_dim)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(max(lengths), *vectors.k_TGH.shape[1:], generator=generator).bfloat16().to(device)
    found = []
    for length in lengths:
        q_TNH, k_TGH, v_TGH = vectors.q_TNH[:length], vectors.k_TGH[:length], values[:length]
        places = torch.arange(length, device=device)
        part = Vectors(vectors.name, q_TNH, k_TGH, vectors.frequencies, vectors.scale)
        weights_NRT = weights_of(part, EXACT, places + reference, places[-rows:])
        repeats = q_TNH.shape[1] // k_TGH.shape[1]
        v_NTH = v_TGH.double().transpose(0, 1).repeat_interleave(repeats, dim=0)
        exact_RNH = (weights_NRT @ v_NTH).transpose(0, 1)
        for rope in ropes:
            here, there = (_attend(kernel, part, v_TGH, rope, places + d) for d in (reference, shift))
            found.append(
                dict(
                    vectors=vectors.name,
                    kernel=kernel.name,
                    rope=rope.name,
                    length=length,
                    reference=reference,
                    shift=shift,
                    moved=float((there - here).norm() / here.norm()),
                    error=float((here[-rows:] - exact_RNH).norm() / exact_RNH.norm()),
                )
            )
    return found


def _attend(kernel: Kernel, vectors: Vectors, v_TGH: Tensor, rope: Rope, positions_T: Tensor) -> Tensor:
    """The kernel's causal output fp64 [T, N, H]."""
    q_TNH, k_TGH = (
        rope(x, positions_T, vectors.frequencies).contiguous() for x in (vectors.q_TNH, vectors.k_TGH)
    )
    length = positions_T.numel()
    borders = torch.tensor([0, length], dtype=torch.int32, device=positions_T.device)
    out_TNH = torch.empty_like(q_TNH)
    segments = Segments(borders, borders, length, length)
    kernel.forward(q_TNH, k_TGH, v_TGH.contiguous(), segments, scale=vectors.scale, out_TNH=out_TNH)
    return out_TNH.double()


def rope_test(
    vectors: Vectors, ropes: Sequence[Rope], *, positions: Sequence[int], count: int = 256
) -> list[Row]:
    """Query vectors at `count` positions up to each of `positions`: error against FP64.

    multiple: of the error that rounding the exact result to BF16 once makes. angle: largest error of an
    angle, radians.
    """
    x_TNH = vectors.q_TNH[spread_rows(vectors.q_TNH.shape[0], count, vectors.q_TNH.device)]
    found = []
    for last in positions:
        places = torch.arange(last - x_TNH.shape[0] + 1, last + 1, device=x_TNH.device)
        exact = EXACT(x_TNH, places, vectors.frequencies)
        rounding = (exact.bfloat16().double() - exact).norm()
        for rope in ropes:
            error = (rope(x_TNH, places, vectors.frequencies).double() - exact).norm()
            off = rope.angles(places, vectors.frequencies).double() - EXACT.angles(
                places, vectors.frequencies
            )
            off = torch.remainder(off + torch.pi, 2 * torch.pi) - torch.pi
            found.append(
                dict(
                    rope=rope.name,
                    position=last,
                    multiple=float(error / rounding),
                    relative_error=float(error / exact.norm()),
                    angle=float(off.abs().max()),
                )
            )
    return found
