"""The precision lab on a GPU: TransformerEngine's kernel does the arithmetic that stands for it elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anchor_megatron.precision.implementations import kernel_test, rope_test
from anchor_megatron.precision.rope import published_ropes, te_kernel_ropes
from anchor_megatron.precision.vectors import random_vectors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FREQUENCIES = torch.from_numpy(5e5 ** -(np.arange(0, 128, 2) / 128))


@pytest.fixture(autouse=True)
def _needs_transformer_engine() -> None:
    pytest.importorskip("transformer_engine")


def test_the_real_kernel_errs_as_its_arithmetic_does() -> None:
    vectors = random_vectors(512, FREQUENCIES, device=torch.device("cuda"))
    rows = rope_test(vectors, [*published_ropes(), *te_kernel_ropes()], positions=[131_072, 1 << 20, 1 << 22])
    multiple = {(row["rope"], row["position"]): row["multiple"] for row in rows}
    for position in (131_072, 1 << 20, 1 << 22):
        assert multiple["ours_kernel", position] <= 1.001
        for kernel, arithmetic in (("te_kernel", "te"), ("ours_kernel", "ours")):
            assert multiple[kernel, position] == pytest.approx(multiple[arithmetic, position], rel=1e-3)


def test_the_attention_kernels_output_moves_least_with_our_embedding() -> None:
    vectors = random_vectors(4096, FREQUENCIES, device=torch.device("cuda"))
    ropes = [rope for rope in (*published_ropes(), *te_kernel_ropes()) if rope.dtype == torch.bfloat16]
    rows = kernel_test(vectors, ropes, reference=16, shift=1_000_000, lengths=[4096])
    moved = {row["rope"]: row["moved"] for row in rows}
    assert moved["ours_kernel"] == pytest.approx(moved["ours"], rel=0.02)
    assert moved["ours_kernel"] < min(moved["te_kernel"], moved["transformers"])
