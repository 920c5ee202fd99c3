"""Markers, a fixed draw of hypothesis's examples, and the end of the processes behind `run_ranks`."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from anchor_megatron.testing.ranks import close_ranks

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session() -> Iterator[None]:
    yield
    close_ranks()
