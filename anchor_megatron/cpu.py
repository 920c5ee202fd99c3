"""Lets Megatron-Core run without a GPU. `install()` once per process, before it builds anything.

Megatron-Core 0.16 names CUDA outright in three ways, each given its stand-in here:

    torch.zeros(1, device="cuda"), p.cuda()          the device becomes the CPU       (a TorchFunctionMode)
    p.type() == "torch.cuda.FloatTensor"             CPU tensors answer as CUDA's do  (the same mode)
    torch.cuda.current_device(), streams, RNG state  no-ops, the CPU's generator      (set on torch.cuda)

The same module mends what breaks in Megatron-Core when its optimizer is torch's AdamW (neither
TransformerEngine nor Apex present): loading a checkpoint asks for a tensor that does not exist, and gives
every parameter the same step counter, which then advances once per parameter. And it gives a router a name
that it only imports with TransformerEngine.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["install"]

_installed: list[TorchFunctionMode] = []


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to:
            args = tuple(_cpu(arg) for arg in args)
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return func(*args, **kwargs)


def _cpu(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _Stream:
    """Work on a CPU is done when the call returns: every wait is over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    wait_event = record_event = record = synchronize = wait = wait_stream


def install() -> None:
    """Makes this process's torch and Megatron-Core treat the CPU as the device. Idempotent.

    Raises RuntimeError where a GPU is present: these stand-ins would then hide it.
    """
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("cpu.install(): got a machine with a CUDA device, expected one without")
    # gradient hooks pass through the mode below; torch then takes Megatron-Core's look at .grad for a mistake
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    _stand_in_for_cuda()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils

    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _mend_torch_adam(distrib_optimizer.DistributedOptimizer)
    if not moe_utils.HAVE_TE:
        moe_utils.te_general_gemm = None


def _stand_in_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(
            cuda, name, lambda *args, **kwargs: None
        )  # one function each: torch.compile's tables want it so
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _mend_torch_adam(optimizer_class: Any) -> None:
    """Two faults of Megatron-Core 0.16.1's optimizer over torch's AdamW; see the file's opening."""
    load_state_dict = optimizer_class.load_state_dict

    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": parameter, **self.optimizer.state[parameter]}.items():
            if key != "step":
                target.copy_(tensors[key])

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    optimizer_class.load_state_dict = load_with_own_steps
