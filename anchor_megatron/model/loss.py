"""The output layer and the cross entropy in one, a chunk of tokens at a time, over a vocabulary split among
ranks.

The logits of 65,536 tokens over 128,256 entries fill 34 GB in fp32. Here only a chunk's exist at a time: its
logits, its loss and at once its gradients, with which the chunk's share of the hidden states' and of the
weight's gradient is computed. Nothing is recomputed: three matrix products a chunk, as without chunks.

    logits = hidden W^T      loss = log sum exp(logits) - logits[label]
    dlogits = (softmax(logits) - onehot) * mask
    dhidden = dlogits W      dW = dlogits^T hidden, summed over the chunks in fp32

The summed loss is a scalar, so its incoming gradient is one factor, applied in backward. (The idea of taking
the gradients in the forward pass is Liger Kernel's, arXiv 2410.10989; this one works under tensor parallelism
and keeps fp32 sums.)

Legend: T tokens, D hidden size, V vocabulary entries of this tensor-parallel rank, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["summed_cross_entropy", "token_cross_entropy"]

# logits of a chunk, elements: 2 GiB in bf16; every chunk reads and writes the weight's fp32 gradient once
_CHUNK_LOGITS = 1 << 30


def summed_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    loss_mask_T: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Sum over tokens of loss_mask * cross entropy, fp32 scalar, equal on all ranks of the tensor-parallel
    `group`.

    `labels_T` int64 are entries of the whole vocabulary, of which rank r of `group` holds rows [r V, (r+1)
    V); entries from `vocab_size` on are padding and take no probability. The hidden states' gradient is this
    rank's share: the caller sums it over `group`.
    """
    return _SummedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, loss_mask_T, vocab_size, group)


@torch.no_grad()
def token_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Cross entropy of every token, fp32 [T], without gradients; arguments as in `summed_cross_entropy`."""
    entries, first = weight_VD.shape[0], group.rank() * weight_VD.shape[0]
    real = min(max(vocab_size - first, 0), entries)
    step = max(1, _CHUNK_LOGITS // entries)
    losses = torch.empty(hidden_TD.shape[0], dtype=torch.float32, device=hidden_TD.device)
    for start in range(0, hidden_TD.shape[0], step):
        chunk = slice(start, start + step)
        logits = hidden_TD[chunk] @ weight_VD.t()
        logits[:, real:] = float("-inf")
        losses[chunk] = _losses(logits, labels_T[chunk] - first, group)[0]
    return losses


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        entries, first = weight.shape[0], group.rank() * weight.shape[0]
        real = min(max(vocab_size - first, 0), entries)
        differentiate = any(ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden) if differentiate else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if differentiate else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, _CHUNK_LOGITS // entries)
        for start in range(0, hidden.shape[0], step):
            chunk = slice(start, start + step)
            logits = hidden[chunk] @ weight.t()
            logits[:, real:] = float("-inf")
            own_labels, mask = labels[chunk] - first, loss_mask[chunk]
            loss, normaliser = _losses(logits, own_labels, group)
            total += (loss * mask).sum()
            if dhidden is not None and dweight is not None:
                dlogits = _gradient(logits, own_labels, normaliser, mask)
                torch.mm(dlogits, weight, out=dhidden[chunk])
                _add_product(dweight, dlogits.t(), hidden[chunk])
        if dhidden is not None and dweight is not None:
            ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        factor = grads[0]
        return dhidden * factor.to(dhidden.dtype), dweight * factor.to(dweight.dtype), None, None, None, None


def _losses(logits_CV: Tensor, labels_C: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(cross entropy, log of the softmax's denominator) fp32 [C], over the vocabulary of all ranks of
    `group`.

    `labels_C` count from this rank's first entry; those that other ranks hold lie outside [0, V).
    """
    largest, denominator, chosen = _statistics(logits_CV, labels_C)
    if group.size() > 1:
        whole = largest.clone()
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
        # a rank whose entries are all padding has a largest of -inf and a denominator of 0
        sums = torch.stack((denominator * torch.exp(largest - whole), chosen))
        dist.all_reduce(sums, group=group)
        largest, (denominator, chosen) = whole, sums
    normaliser = largest + denominator.log()
    return normaliser - chosen, normaliser


def _statistics(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest), and the label's logit (0 where another rank holds it), fp32
    [C].
    """
    if logits_CV.is_cuda:
        from anchor_megatron.model import loss_triton

        return loss_triton.statistics(logits_CV, labels_C)
    logits = logits_CV.float()
    largest = logits.amax(dim=1)
    finite = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    denominator = (logits - finite[:, None]).exp().sum(dim=1)
    here = (labels_C >= 0) & (labels_C < logits.shape[1])
    picked = logits.gather(1, labels_C.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return largest, denominator, torch.where(here, picked, torch.zeros_like(picked))


def _gradient(logits_CV: Tensor, labels_C: Tensor, normaliser_C: Tensor, mask_C: Tensor) -> Tensor:
    """(softmax - onehot) * mask, in the logits' dtype and, on a GPU, in their place."""
    if logits_CV.is_cuda:
        from anchor_megatron.model import loss_triton

        return loss_triton.gradient_(logits_CV, labels_C, normaliser_C, mask_C)
    found = (logits_CV.float() - normaliser_C[:, None]).exp()
    rows = torch.nonzero((labels_C >= 0) & (labels_C < logits_CV.shape[1])).squeeze(1)
    found[rows, labels_C[rows]] -= 1.0
    return (found * mask_C[:, None]).to(logits_CV.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32 whatever the factors' dtype."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
