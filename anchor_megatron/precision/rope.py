"""Rotary embedding as different programs compute it, behind one signature.

A pair (x1, x2) at position p turns by the angle a = p * frequency. What differs between programs is how `a`
is made and where results are rounded. The cosine of Llama 3's second pair (frequency 0.8146) at position
1,048,575:

    FP64 product, reduced mod 2 pi                 0.70395
    the same, cosine rounded to BF16               0.70313
    FP32 product of position and frequency         0.71522
    BF16 product of both                           0.40981

Legend: T tokens, N heads, H head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "EXACT",
    "Rope",
    "fp32_angles",
    "published_ropes",
    "reduced_angles",
    "te_kernel_ropes",
    "turn_once",
]

Angles = Callable[[Tensor, Tensor], Tensor]
Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rope:
    """One way to compute the embedding.

    name: in tables and files. title: in words. dtype: of vectors in and out. angles: (positions int64 [T],
    frequencies fp64 [H/2]) -> [T, H/2]. turn: (x [T, N, H], angles [T, H/2]) -> [T, N, H], the halves of H
    being the pairs' first and second members.
    """

    name: str
    title: str
    dtype: torch.dtype
    angles: Angles
    turn: Turn

    def __call__(self, x_TNH: Tensor, positions_T: Tensor, frequencies: Tensor) -> Tensor:
        """`x_TNH` cast to `dtype` and turned for its positions."""
        return self.turn(x_TNH.to(self.dtype), self.angles(positions_T, frequencies))


def reduced_angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """FP64 product, reduced mod 2 pi, stored in FP32: what `model/rotary.py` does."""
    return torch.outer(positions_T.double(), frequencies).remainder_(2 * math.pi).float()


def fp32_angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """FP32 product of FP32 factors: transformers, stock Megatron-Core."""
    return torch.outer(positions_T.float(), frequencies.float())


def bf16_angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """Factors and product in BF16: what becomes of FP32 code when a whole model, buffers included, is
    cast.
    """
    return torch.outer(positions_T.bfloat16(), frequencies.bfloat16())


def turn_once(x_TNH: Tensor, angles: Tensor) -> Tensor:
    """All in the wider of FP32 and x's type, rounded once at the end: TransformerEngine's fused kernel."""
    wide = torch.promote_types(x_TNH.dtype, torch.float32)
    cosine, sine = (f(angles.to(wide))[:, None] for f in (torch.cos, torch.sin))
    one, two = x_TNH.to(wide).chunk(2, dim=-1)
    return torch.cat((one * cosine - two * sine, two * cosine + one * sine), dim=-1).to(x_TNH.dtype)


def turn_transformers(x_TNH: Tensor, angles: Tensor) -> Tensor:
    """transformers' own function: cosine and sine rounded to x's type, each product and the sum too."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    both = torch.cat((angles, angles), dim=-1)
    cosine, sine = (f(both)[None].to(x_TNH.dtype) for f in (torch.cos, torch.sin))
    turned, _ = apply_rotary_pos_emb(x_TNH[None], x_TNH[None], cosine, sine, unsqueeze_dim=2)
    return turned[0]


def turn_megatron(x_TNH: Tensor, angles: Tensor) -> Tensor:
    """Megatron-Core's own unfused function; on a machine without a GPU `cpu.install()` has to come first."""
    from megatron.core.models.common.embeddings import rope_utils

    both = torch.cat((angles, angles), dim=-1)[:, None, None]
    return rope_utils._apply_rotary_pos_emb_bshd(x_TNH[:, None], both)[:, 0]


def turn_te_kernel(x_TNH: Tensor, angles: Tensor) -> Tensor:
    """TransformerEngine's fused kernel itself."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    both = torch.cat((angles, angles), dim=-1)[:, None, None].contiguous()
    return apply_rotary_pos_emb(x_TNH[:, None].contiguous(), both, tensor_format="sbhd", fused=True)[:, 0]


def exact_angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """The FP64 product; at position 4 million still right to 1e-9 rad."""
    return torch.outer(positions_T.double(), frequencies)


EXACT = Rope("fp64", "FP64 throughout", torch.float64, exact_angles, turn_once)


@functools.cache
def published_ropes() -> tuple[Rope, ...]:
    """Every implementation that runs on any machine; TransformerEngine's kernel by its arithmetic."""
    half = torch.bfloat16
    return (
        Rope("fp32", "FP32, angles from an FP32 product", torch.float32, fp32_angles, turn_once),
        Rope("transformers", "BF16, transformers", half, fp32_angles, turn_transformers),
        Rope("megatron", "BF16, Megatron-Core unfused", half, fp32_angles, turn_megatron),
        Rope(
            "te", "BF16, TransformerEngine fused, angles from an FP32 product", half, fp32_angles, turn_once
        ),
        Rope("ours", "BF16, fused, our angles (FP64, reduced)", half, reduced_angles, turn_once),
        Rope("ours_unfused", "BF16, Megatron-Core unfused, our angles", half, reduced_angles, turn_megatron),
        Rope("bf16_angles", "BF16, the angles too", half, bf16_angles, turn_transformers),
    )


@functools.cache
def te_kernel_ropes() -> tuple[Rope, ...]:
    """TransformerEngine's real kernel with either kind of angles; empty without a GPU or
    TransformerEngine.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return ()
    half = torch.bfloat16
    return (
        Rope("te_kernel", "BF16, the real kernel, FP32 angles", half, fp32_angles, turn_te_kernel),
        Rope("ours_kernel", "BF16, the real kernel, our angles", half, reduced_angles, turn_te_kernel),
    )  # fmt: skip
