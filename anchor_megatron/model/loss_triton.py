"""The cross entropy's two passes over a chunk of logits as Triton kernels: statistics (a read), gradient (a
read, a write).

Legend: C tokens of a chunk, V vocabulary entries of this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gradient_", "statistics"]

_BLOCK = 8192


@triton.jit
def _statistics(logits, labels, largest, denominator, chosen, V, row_stride, BLOCK: tl.constexpr):
    """Online maximum and sum of exponentials of one row."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * row_stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(line + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # entries so far may all be padding
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)
        top = higher
    label = tl.load(labels + row)
    here = (label >= 0) & (label < V)
    tl.store(largest + row, top)
    tl.store(denominator + row, total)
    tl.store(chosen + row, tl.load(line + label, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits, labels, normaliser, loss_mask, V, row_stride, BLOCK: tl.constexpr):
    """(softmax - onehot) * mask of one row's block, in place."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    line = logits + row * row_stride
    column = start + tl.arange(0, BLOCK)
    x = tl.load(line + column, mask=column < V, other=float("-inf")).to(tl.float32)
    found = tl.exp(x - tl.load(normaliser + row)) - tl.where(column == tl.load(labels + row), 1.0, 0.0)
    found *= tl.load(loss_mask + row)
    tl.store(line + column, found.to(logits.dtype.element_ty), mask=column < V)


def statistics(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest), and the label's logit (0 where it lies outside [0, V)),
    fp32 [C].
    """
    largest, denominator, chosen = torch.empty((3, logits_CV.shape[0]), device=logits_CV.device).unbind()
    _statistics[(logits_CV.shape[0],)](
        logits_CV, labels_C, largest, denominator, chosen, logits_CV.shape[1], logits_CV.stride(0),
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return largest, denominator, chosen


def gradient_(logits_CV: Tensor, labels_C: Tensor, normaliser_C: Tensor, loss_mask_C: Tensor) -> Tensor:
    """Turns `logits_CV` into the loss's gradient in place, and returns it; the others are [C]."""
    grid = (logits_CV.shape[0], triton.cdiv(logits_CV.shape[1], _BLOCK))
    _gradient[grid](
        logits_CV, labels_C, normaliser_C, loss_mask_C, logits_CV.shape[1], logits_CV.stride(0), BLOCK=_BLOCK,
        num_warps=8,
    )  # fmt: skip
    return logits_CV
