"""Other implementations of attention to measure and test against, each a function of packed q, k, v.

Legend: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.attention.execute import planned_attention
from anchor_megatron.attention.kernels import Kernel
from anchor_megatron.attention.plan_tensors import PackedArrays, PlanTensors, plan_arrays, plan_tensors
from anchor_megatron.layout.placement import place
from anchor_megatron.layout.plan import make_plan

__all__ = [
    "device_plan",
    "flex_anchor",
    "ours",
    "transformer_engine_thd",
    "transformer_engine_thd_cp",
]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def device_plan(
    lengths: np.ndarray, *, placement: str, ranks: int, rank: int
) -> tuple[PlanTensors, np.ndarray]:
    """This rank's plan on the GPU for documents of `lengths`, and the tokens it holds."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    placed = place(placement, cu_seqlens, context_parallel_size=ranks, window_length=int(cu_seqlens[-1]))
    plan = make_plan(placed, rank)
    arrays = PackedArrays.pack(plan_arrays(plan)).to(torch.device("cuda"))
    return plan_tensors(plan, arrays), plan.token_index


def ours(plan: PlanTensors, kernel: Kernel, head_dim: int, group: dist.ProcessGroup | None) -> Attention:
    """Attention over `plan`."""
    return lambda q, k, v: planned_attention(
        q, k, v, plan=plan, kernel=kernel, scale=head_dim**-0.5, group=group
    )


def flex_anchor(lengths: np.ndarray) -> Attention:
    """torch's FlexAttention, compiled, with the paper's mask: k <= q and (same document or k == 0).

    `lengths` are of documents without anchors; token 0 is the one anchor before them all.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.from_numpy(np.repeat(np.arange(lengths.size + 1), np.concatenate([[1], lengths]))).cuda()

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((document[q] == document[k]) | (k == 0))

    tokens = int(lengths.sum()) + 1
    mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(query, key, value, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def transformer_engine_thd(lengths: np.ndarray, *, heads: int, groups: int, head_dim: int) -> Attention:
    """TransformerEngine's attention over packed documents on one GPU."""
    return _te_attention(lengths, lengths, heads=heads, groups=groups, head_dim=head_dim, group=None)


def transformer_engine_thd_cp(
    lengths: np.ndarray, *, heads: int, groups: int, head_dim: int, group: dist.ProcessGroup
) -> tuple[Attention, Tensor]:
    """TransformerEngine's context parallelism (p2p) over packed documents, and this rank's padded tokens.

    Every document is padded to a multiple of twice the number of ranks, as its sharding asks.
    """
    import transformer_engine_torch as extension

    unit = 2 * group.size()
    padded = -(-lengths // unit) * unit
    borders = _borders(padded)
    tokens = int(padded.sum())
    held = extension.thd_get_partitioned_indices(borders, tokens, group.size(), group.rank())
    return _te_attention(lengths, padded, heads=heads, groups=groups, head_dim=head_dim, group=group), held


def _te_attention(
    lengths: np.ndarray,
    padded: np.ndarray,
    *,
    heads: int,
    groups: int,
    head_dim: int,
    group: dist.ProcessGroup | None,
) -> Attention:
    from transformer_engine.pytorch import DotProductAttention

    options: dict[str, Any] = {}
    if group is not None:
        ranks = dist.get_process_group_ranks(group)
        options = dict(
            cp_group=group, cp_global_ranks=ranks, cp_stream=torch.cuda.Stream(), cp_comm_type="p2p"
        )
    module = DotProductAttention(
        heads, head_dim, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd",
        attn_mask_type="padding_causal", **options,
    )  # fmt: skip
    longest = int(padded.max())
    borders, padded_borders = _borders(lengths), _borders(padded)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = module(
            q, k, v, cu_seqlens_q=borders, cu_seqlens_kv=borders, cu_seqlens_q_padded=padded_borders,
            cu_seqlens_kv_padded=padded_borders, max_seqlen_q=longest, max_seqlen_kv=longest,
        )  # fmt: skip
        return out.view(q.shape)

    return attend


def _borders(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).int().cuda()
