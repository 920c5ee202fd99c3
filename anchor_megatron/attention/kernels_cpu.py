"""torch's flash attention for the CPU behind the kernels' signature."""

from __future__ import annotations

import torch
from torch import Tensor

from anchor_megatron.attention.kernels import Segments

__all__ = ["TorchCpuKernel"]


class TorchCpuKernel:
    """torch's flash attention for the CPU, one document at a time; fp64, fp32 and bf16, grouped heads."""

    name = "torch_cpu"

    @staticmethod
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run here; None where it can."""
        return None if device.type == "cpu" else "it runs on the CPU alone"

    def forward(
        self,
        q_TNH: Tensor,
        k_KGH: Tensor,
        v_KGH: Tensor,
        segments: Segments,
        *,
        scale: float,
        out_TNH: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """See `Kernel.forward`."""
        lse_dtype = torch.promote_types(q_TNH.dtype, torch.float32)
        lse_NT = torch.empty(q_TNH.shape[1], q_TNH.shape[0], dtype=lse_dtype)
        for rows, keys in _documents(segments):
            query, key, value = _heads_first(q_TNH[rows], k_KGH[keys], v_KGH[keys])
            aligned, mask = _mask(query, key, causal)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, aligned, attn_mask=mask, scale=scale
            )
            out_TNH[rows] = out[0].transpose(0, 1)
            lse_NT[:, rows] = lse[0]
        return lse_NT

    def backward(
        self,
        dout_TNH: Tensor,
        q_TNH: Tensor,
        k_KGH: Tensor,
        v_KGH: Tensor,
        out_TNH: Tensor,
        lse_NT: Tensor,
        segments: Segments,
        *,
        scale: float,
        into: tuple[Tensor, Tensor, Tensor],
        causal: bool = True,
    ) -> None:
        """See `Kernel.backward`."""
        for rows, keys in _documents(segments):
            query, key, value = _heads_first(q_TNH[rows], k_KGH[keys], v_KGH[keys])
            aligned, mask = _mask(query, key, causal)
            dout, out = _heads_first(dout_TNH[rows], out_TNH[rows])
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, query, key, value, out, lse_NT[None, :, rows], 0.0, aligned, attn_mask=mask, scale=scale
            )
            for grad, where, one in zip(into, (rows, keys, keys), found, strict=True):
                grad[where] = one[0].transpose(0, 1)


def _documents(segments: Segments) -> list[tuple[slice, slice]]:
    """Each document's query rows and key rows."""
    q_ends, k_ends = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    rows = [slice(*pair) for pair in zip(q_ends, q_ends[1:], strict=False)]
    keys = [slice(*pair) for pair in zip(k_ends, k_ends[1:], strict=False)]
    return list(zip(rows, keys, strict=True))


def _heads_first(*packed: Tensor) -> list[Tensor]:
    """[T, N, H] -> [1, N, T, H]."""
    return [x.transpose(0, 1)[None] for x in packed]


def _mask(query: Tensor, key: Tensor, causal: bool) -> tuple[bool, Tensor | None]:
    """torch's causal flag aligns top left: right for squares only, an additive mask for the rest."""
    if not causal:
        return False, None
    rows, keys = query.shape[2], key.shape[2]
    if rows == keys:
        return True, None
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    return False, torch.zeros(rows, keys, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
