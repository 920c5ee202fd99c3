"""Rates fitted to samples are those of the machine that gave them; a run places by what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anchor_megatron.layout.cost import CostModel, LayerShape, Machine, read_machine
from anchor_megatron.layout.exchanges import EXCHANGES
from anchor_megatron.layout.placement import place
from anchor_megatron.profiling.calibrate import calibrate, least_squares
from anchor_megatron.profiling.measure import Case, Sample
from anchor_megatron.profiling.predict import predict
from anchor_megatron.profiling.windows import draw_window
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.training.loader import cost_model

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "document_lengths.csv"
SHAPE = LayerShape(heads=4, groups=2, head_dim=16, bytes_per_value=4)


def samples_of(machine: Machine, sizes: tuple[int, ...]) -> list[Sample]:
    """Samples that a machine of these rates would give."""
    found = []
    for seed, ranks in enumerate(sizes):
        tokens = 8192 * ranks
        cu_seqlens = draw_window(TABLE, tokens=tokens, longest=tokens // 4, seed=seed)
        placement = place("document", cu_seqlens, context_parallel_size=ranks, window_length=tokens)
        for exchange in EXCHANGES if ranks in (2, 4) else ("sparse",):
            case = Case("document", placement, exchange, CostModel(shape=SHAPE), ring_rows=256, group=None)
            prediction = case.predicted(machine)
            each = (one * 1e3 for one in (prediction.attention, prediction.exchange, prediction.total))
            found.append(Sample(case, *each))
    return found


def test_calibration_finds_the_rates_of_a_machine() -> None:
    machine = Machine(
        forward_tflops=100, backward_tflops=80, forward_row_pairs=300, backward_row_pairs=200,
        inside_gb_per_s=50, latency_us=20, memory_gb_per_s=400, contention=0.4, merge_gb_per_s=33,
        heads_gb_per_s=22,
    )  # fmt: skip
    found = calibrate(samples_of(machine, (1, 2, 4, 8)), CostModel())
    for name in ("forward_tflops", "backward_tflops", "forward_row_pairs", "backward_row_pairs",
                 "inside_gb_per_s", "latency_us", "memory_gb_per_s", "contention"):  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=1e-3), name
    for name in ("merge_gb_per_s", "heads_gb_per_s"):
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=0.02), name
    assert found.between_gb_per_s == Machine().between_gb_per_s


def test_a_case_is_predicted_by_the_way_that_ran() -> None:
    cu_seqlens = draw_window(TABLE, tokens=131072, longest=32768, seed=0)
    placement = place("document", cu_seqlens, context_parallel_size=8, window_length=131072)
    case = Case("document", placement, "sparse", CostModel(), ring_rows=1, group=None)
    slow = Machine(inside_gb_per_s=30)
    other = predict("sparse", placement, CostModel(slow), ring_rows=1)
    assert other is not None and other.head_parts != case.way.head_parts
    assert case.predicted(slow).head_parts == case.way.head_parts


def test_calibration_on_one_rank_leaves_the_exchange_as_it_was() -> None:
    found = calibrate(samples_of(Machine(forward_tflops=7), (1, 1)), CostModel())
    assert found.forward_tflops == pytest.approx(7)
    assert (found.inside_gb_per_s, found.contention) == (Machine().inside_gb_per_s, Machine().contention)


def test_least_squares_never_goes_below_zero() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert least_squares(columns, np.array([5.0, 7.0, 9.0])) == pytest.approx([3.0, 2.0])
    found = least_squares(columns, np.array([9.0, 7.0, 5.0]))
    assert found.min() == 0 and found.max() > 0


def test_a_run_places_by_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"machine": {"forward_tflops": 123, "tile": 64}}')
    attention = dict(calibration=str(path), ranks_per_node=4)
    costs = cost_model(
        tiny_config(attention=attention, parallel=dict(tensor=2), train=dict(precision="bf16"))
    )
    assert costs.machine == Machine(forward_tflops=123, tile=64) and costs.ranks_per_node == 4
    assert costs.shape == LayerShape(heads=2, groups=1, head_dim=16, bytes_per_value=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a JSON file with an entry machine"),
        ("nothing", "expected a JSON file with an entry machine"),
        ('{"machine": {"speed": 3}}', "machine.speed: expected one of forward_tflops"),
        ('{"machine": {"tile": 0}}', "machine.tile: got 0, expected a number above 0"),
        ('{"machine": {"latency_us": -1}}', "machine.latency_us: got -1"),
    ],
)
def test_a_bad_calibration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_machine(path)
