"""Tests that need GPUs: marked so here, and skipped where there are too few."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine"):
    import transformer_engine.pytorch  # noqa: F401 (before anything that touches cuDNN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
