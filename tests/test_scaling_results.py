"""The measured rows that are kept: what the cost model, which is not fitted to them, predicts for each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_megatron.layout.cost import CostModel, LayerShape, Machine
from anchor_megatron.layout.placement import PLACEMENTS, place
from anchor_megatron.profiling.predict import predict
from anchor_megatron.profiling.sweep import Sweep

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TABLE = RESULTS.parent / "document_lengths.csv"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("scaling_*.json")), ids=lambda path: path.stem)
def test_the_cost_model_predicts_what_was_measured(path: Path) -> None:
    results = json.loads(path.read_text())
    settings = Sweep(
        TABLE, [], [], [], [], [], results["tokens_per_rank"], results["total_tokens"], results["parts"], 1,
        torch.device("cpu"), Machine(), results["ranks_per_node"], results["ring_rows"],
    )  # fmt: skip
    rows = [row for row in results["rows"] if row["name"] == "ours"]
    assert {row["placement"] for row in rows} == set(PLACEMENTS)
    assert {row["exchange"] for row in rows} >= {"sparse", "ring", "ulysses"}
    for row in rows:
        heads, groups = map(int, row["heads"].split("/"))
        shape = LayerShape(heads, groups, results["shape"]["head_dim"], results["shape"]["bytes_per_value"])
        costs = CostModel(Machine(), shape, results["ranks_per_node"])
        cu_seqlens = settings.borders(row["workload"], row["ranks"])
        placement = place(
            row["placement"], cu_seqlens, context_parallel_size=row["ranks"], window_length=row["tokens"],
            costs=costs,
        )  # fmt: skip
        found = predict(row["exchange"], placement, costs, ring_rows=results["ring_rows"])
        assert found is not None
        predicted = float(np.max(found.total, axis=1).sum()) * 1e3
        assert predicted == pytest.approx(row["total_ms"], rel=0.15), row
