"""Rotary angles for explicit positions, exact at any length.

    angle[t, i] = position[t] * inverse_frequency[i]   computed in fp64, reduced mod 2 pi, stored in fp32

An fp32 product is off by up to half a unit in its last place, which at position 1,048,575 is 0.06 rad;
reduced first, the stored angle is off by 2e-7 rad at any position. All layers of a step share one table.

Legend: T tokens, H head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["RotaryAngles"]


class RotaryAngles(nn.Module):
    """Positions to the angles that Megatron-Core's (and TransformerEngine's fused) rotary kernels take."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        """`inverse_frequencies` fp64 [H/2], radians a token."""
        super().__init__()
        assert inverse_frequencies.dtype == torch.float64, (
            f"got {inverse_frequencies.dtype}, expected float64"
        )
        # a plain attribute: neither .bfloat16() nor a checkpoint may touch it
        self._fp64 = inverse_frequencies

    def forward(self, positions_T: Tensor) -> Tensor:
        """Angles fp32 [T, 1, 1, H] in [0, 2 pi) for integer positions [T]; the two halves of H repeat each
        other.
        """
        if self._fp64.device != positions_T.device:
            self._fp64 = self._fp64.to(positions_T.device)
        angles = torch.outer(positions_T.to(torch.float64), self._fp64).remainder_(2 * math.pi).float()
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
