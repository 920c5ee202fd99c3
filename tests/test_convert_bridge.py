"""Megatron-Bridge as a peer: it must put the same Hugging Face tensors in the same places, both ways.

Megatron-Bridge 0.3.1 needs transformers 4 and, to be imported, TransformerEngine, mamba-ssm and
causal-conv1d. Dummies stand in for those three; the tests are skipped where it is not installed. To run them,
in an environment of its own:

    pip install -e .[dev] "transformers<5" && pip install --no-deps megatron-bridge==0.3.1 hydra-core ...
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import load, make_hf, our_config

from anchor_megatron.convert.importing import import_checkpoint
from anchor_megatron.convert.sources import open_source
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.setup import initialize_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.bridge") is None,
        reason="megatron-bridge is not installed (it needs transformers 4)",
    ),
]


class _Named(type):
    """A class with every attribute, each a class like it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Dummies(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves packages of which only the names are needed."""

    NAMES = ("transformer_engine", "mamba_ssm", "causal_conv1d")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _Named.__getattr__.__get__(module)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def both_on_rank(rank: int, world_size: int, hf: Path, megatron: Path) -> tuple[dict[str, Any], ...]:
    """Our weights and the bridge's in our model, and what the bridge exports from it."""
    sys.meta_path.append(_Dummies())  # after megatron.core was imported, which must not find them
    from megatron.bridge import AutoBridge

    config = our_config(megatron)
    config.model.make_vocab_size_divisible_by = 1  # the bridge does not pad here
    initialize_ranks(config)
    gpt = load(str(megatron), config)
    ours = {name: value.clone() for name, value in gpt.state_dict().items() if torch.is_tensor(value)}
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(7.0)
    bridge = AutoBridge.from_hf_pretrained(str(hf))
    bridge.load_hf_weights([gpt])
    theirs = {name: value.clone() for name, value in gpt.state_dict().items() if torch.is_tensor(value)}
    if config.model.num_experts is not None:  # 0.3.1 cannot export experts that are modules of their own
        return ours, theirs, {}
    exported = {name: value.clone() for name, value in bridge.export_hf_weights([gpt], cpu=True)}
    return ours, theirs, exported


@pytest.mark.parametrize(
    "case", ["llama", "llama without groups", "mistral, yarn", "qwen2 tied", "qwen3, linear", "qwen3_moe"]
)
def test_the_bridge_agrees(case: str, tmp_path: Path) -> None:
    hf = make_hf(case, tmp_path / "hf", plain_rope=True)  # transformers 4 has no rope_parameters
    import_checkpoint(hf, tmp_path / "megatron", say=lambda message: None)
    ours, theirs, exported = run_ranks(1, both_on_rank, hf, tmp_path / "megatron")[0]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    tensors = open_source(hf).tensors
    assert exported.keys() >= tensors.keys() or case == "qwen3_moe"
    for name, value in exported.items():
        assert name not in tensors or torch.equal(value, tensors[name].read(0, len(value))), name
