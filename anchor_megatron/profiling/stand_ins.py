"""Kernels that take a layer apart: one computes nothing, one remembers its calls.

With `NoAttention` what is left of a layer is its exchange. `Remembered` runs the real kernel, and afterwards
the same calls again with nothing else around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anchor_megatron.attention.kernels import Kernel, Segments

__all__ = ["NoAttention", "Remembered"]


class NoAttention:
    """Leaves outputs and gradients as they are in memory."""

    name = "none"

    @staticmethod
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Runs everywhere."""
        return None

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
        return torch.zeros(q_TNH.shape[1], q_TNH.shape[0], device=q_TNH.device)

    def backward(self, *tensors: Any, **options: Any) -> None:
        """See `Kernel.backward`."""


class Remembered:
    """`kernel`, and replays of the calls that it was given between two `forget`s."""

    problem = staticmethod(NoAttention.problem)

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name = kernel, kernel.name
        self.forwards: list[Callable[[], Any]] = []
        self.backwards: list[Callable[[], Any]] = []

    def forget(self) -> None:
        """Lets go of all calls, and of the tensors they hold."""
        self.forwards, self.backwards = [], []

    def forward(self, *tensors: Any, **options: Any) -> Tensor:
        """See `Kernel.forward`."""
        self.forwards.append(lambda: self.kernel.forward(*tensors, **options))
        return self.forwards[-1]()

    def backward(self, *tensors: Any, **options: Any) -> None:
        """See `Kernel.backward`."""
        self.backwards.append(lambda: self.kernel.backward(*tensors, **options))
        self.backwards[-1]()

    def replay(self, calls: list[Callable[[], Any]]) -> None:
        """Makes these calls again."""
        with torch.no_grad():
            for call in calls:
                call()
