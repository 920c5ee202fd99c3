"""Which kernel runs: the one asked for, else the fastest that can; said once, with the reason."""

from __future__ import annotations

import functools
import logging

import torch

from anchor_megatron.attention.kernels import Kernel
from anchor_megatron.attention.kernels_cpu import TorchCpuKernel
from anchor_megatron.attention.kernels_gpu import GPU_KERNELS

__all__ = ["KERNEL_NAMES", "choose_kernel"]

_KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (*GPU_KERNELS, TorchCpuKernel)}
KERNEL_NAMES = ("auto", *_KERNELS)
_log = logging.getLogger(__name__)


@functools.cache
def choose_kernel(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel called `name` where it can run, else ("auto": at once) the fastest that can.

    A kernel that was asked for and cannot run is passed over with a warning that says why. ValueError for an
    unknown name, or where none can run.
    """
    if name not in KERNEL_NAMES:
        raise ValueError(f"attention.kernel: got {name!r}, expected one of {', '.join(KERNEL_NAMES)}")
    order = list(_KERNELS) if name == "auto" else [name, *(other for other in _KERNELS if other != name)]
    problems: list[str] = []
    for candidate in order:
        problem = _KERNELS[candidate].problem(device, dtype, head_dim)
        if problem is None:
            _log.info("attention kernel %s%s", candidate, "".join(f"; not {text}" for text in problems))
            return _KERNELS[candidate]()
        problems.append(f"{candidate}: {problem}")
        if candidate == name:
            _log.warning("attention.kernel: %s cannot run here (%s); taking the next", name, problem)
    raise ValueError(
        f"attention.kernel: none can run {dtype}, head size {head_dim} on {device}: {'; '.join(problems)}"
    )
