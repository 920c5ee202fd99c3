"""GPU attention kernels, fastest first: flash-attn 4, TransformerEngine's cuDNN, torch's own
FlashAttention-2.

flash-attn 4 writes its results where it is told; the other two allocate them, which costs a copy.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from anchor_megatron.attention.kernels import Segments

__all__ = ["GPU_KERNELS", "FlashAttention4", "TorchVarlen", "TransformerEngineKernel"]

_MASKS = {True: "padding_causal_bottom_right", False: "padding"}  # TransformerEngine's names
_HALF = (torch.bfloat16, torch.float16)


def _common_problem(device: torch.device, dtype: torch.dtype, head_dim: int, largest: int) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if head_dim % 8 or head_dim > largest:
        return f"it takes head sizes that are multiples of 8 up to {largest}, not {head_dim}"
    return None if dtype in _HALF else f"it takes bfloat16 and float16, not {dtype}"


class FlashAttention4:
    """flash-attn 4 (`flash_attn.cute`; arXiv 2407.08608 is the algorithm on Hopper)."""

    name = "flash_attention_4"

    def __init__(self) -> None:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        self._forward, self._backward = _flash_attn_fwd, _flash_attn_bwd

    @staticmethod
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run here; None where it can."""
        if (
            importlib.util.find_spec("flash_attn") is None
            or importlib.util.find_spec("flash_attn.cute") is None
        ):
            return "the package flash-attn-4 is not installed"
        problem = _common_problem(device, dtype, head_dim, 128)
        if problem is None and torch.cuda.get_device_capability(device)[0] not in (9, 10, 11):
            return f"it needs Hopper or Blackwell, not {torch.cuda.get_device_name(device)}"
        return problem

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
        lse_NT = self._forward(
            q_TNH, k_KGH, v_KGH, **_borders(segments), softmax_scale=scale, causal=causal, return_lse=True,
            out=out_TNH,
        )[1]  # fmt: skip
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
        dq, dk, dv = into
        self._backward(
            q_TNH, k_KGH, v_KGH, out_TNH, dout_TNH, lse_NT, softmax_scale=scale, causal=causal,
            **_borders(segments), dq=dq, dk=dk, dv=dv,
        )  # fmt: skip


class TorchVarlen:
    """The FlashAttention-2 that torch carries, behind `torch.nn.attention.varlen`; there wherever CUDA is."""

    name = "torch_varlen"

    @staticmethod
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run here; None where it can."""
        return _common_problem(device, dtype, head_dim, 256)

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
        found = torch.ops.aten._flash_attention_forward(
            q_TNH, k_KGH, v_KGH, *_positional(segments), 0.0, causal, False, scale=scale
        )
        out_TNH.copy_(found[0])
        return found[1]

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
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_TNH.device)
        found = torch.ops.aten._flash_attention_backward(
            dout_TNH, q_TNH, k_KGH, v_KGH, out_TNH, lse_NT, *_positional(segments), 0.0, causal,
            no_dropout, no_dropout, scale=scale,
        )  # fmt: skip
        for grad, one in zip(into, found, strict=True):
            grad.copy_(one)


class TransformerEngineKernel:
    """cuDNN's fused attention by way of TransformerEngine, packed ("thd") layout."""

    name = "transformer_engine"

    def __init__(self) -> None:
        import transformer_engine.pytorch  # noqa: F401 (registers the extension that the next import needs)
        import transformer_engine_torch as extension
        from transformer_engine.pytorch.cpp_extensions import fused_attn

        self._fused = fused_attn
        self._common: dict[str, Any] = dict(
            fused_attention_backend=fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"],
            qkv_layout="thd_thd_thd",
        )
        self._dtypes = {torch.bfloat16: extension.DType.kBFloat16, torch.float16: extension.DType.kFloat16}

    @staticmethod
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run here; None where it can."""
        if importlib.util.find_spec("transformer_engine") is None:
            return "the package transformer-engine is not installed"
        problem = _common_problem(device, dtype, head_dim, 128)
        if problem is None and torch.cuda.get_device_capability(device)[0] < 9:
            return f"cuDNN's packed layout needs Hopper or newer, not {torch.cuda.get_device_name(device)}"
        return problem

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
        out, (stats_TN1, *_) = self._fused.fused_attn_fwd(
            True, segments.max_seqlen_q, segments.max_seqlen_k, segments.cu_seqlens_q, segments.cu_seqlens_k,
            *_contiguous(q_TNH, k_KGH, v_KGH), q_TNH.dtype, attn_scale=scale, **_padded(segments),
            attn_mask_type=_MASKS[causal], **self._common,
        )[:2]  # fmt: skip
        out_TNH.copy_(out)
        return stats_TN1.squeeze(-1).transpose(0, 1)

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
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q_TNH.device)
        stats_TN1 = lse_NT.transpose(0, 1).contiguous().unsqueeze(-1)
        found = self._fused.fused_attn_bwd(
            segments.max_seqlen_q, segments.max_seqlen_k, segments.cu_seqlens_q, segments.cu_seqlens_k,
            *_contiguous(q_TNH, k_KGH, v_KGH, out_TNH, dout_TNH), q_TNH.dtype, self._dtypes[q_TNH.dtype],
            [stats_TN1, no_dropout], attn_scale=scale, **_padded(segments),
            attn_mask_type=_MASKS[causal], **self._common,
        )  # fmt: skip
        for grad, one in zip(into, found[:3], strict=True):
            grad.copy_(one)


GPU_KERNELS = (FlashAttention4, TransformerEngineKernel, TorchVarlen)


def _borders(segments: Segments) -> dict[str, Any]:
    return dict(
        cu_seqlens_q=segments.cu_seqlens_q,
        cu_seqlens_k=segments.cu_seqlens_k,
        max_seqlen_q=segments.max_seqlen_q,
        max_seqlen_k=segments.max_seqlen_k,
    )


def _positional(segments: Segments) -> tuple[Any, ...]:
    return tuple(_borders(segments).values())


def _padded(segments: Segments) -> dict[str, Tensor]:
    """Nothing is padded: the padded borders are the borders."""
    return dict(cu_seqlens_q_padded=segments.cu_seqlens_q, cu_seqlens_kv_padded=segments.cu_seqlens_k)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
