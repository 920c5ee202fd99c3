"""Context parallelism predicted for any number of ranks, or measured on those at hand: tables and a report.

    python tools/profile_cp.py --simulate
    python tools/profile_cp.py --simulate --lengths my_lengths.txt --cp 8 64 --ranks-per-node 8
    torchrun --nproc-per-node 2 tools/profile_cp.py --measure --output build/measured
    python tools/profile_cp.py --simulate --calibration build/measured.json

Writes OUTPUT.json and OUTPUT.html, which opens without a network. docs/scaling.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anchor_megatron.layout.cost import CostModel, LayerShape, Machine, read_machine
from anchor_megatron.layout.exchanges import EXCHANGES
from anchor_megatron.layout.placement import PLACEMENTS
from anchor_megatron.profiling.report import write_report
from anchor_megatron.profiling.simulate import RANKS, Settings, simulate
from anchor_megatron.profiling.table import measured_line, measured_table, placement_table, prediction_table
from anchor_megatron.testing.lengths import WORKLOADS
from anchor_megatron.testing.timing import environment, write_results

LENGTHS = Path(__file__).resolve().parent.parent / "benchmarks" / "document_lengths.csv"


def main() -> int:
    """Returns the process's exit status."""
    given = parser().parse_args()
    try:
        check_options(given)
        run_measurement(given) if given.measure else run_simulation(given)
    except ValueError as error:
        print(f"profile_cp.py: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = found.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", action="store_true", help="predict; needs no GPU")
    what.add_argument("--measure", action="store_true", help="measure, under torchrun")
    found.add_argument("--lengths", type=Path, default=LENGTHS, help="document lengths (%(default)s)")
    found.add_argument("--cp", type=int, nargs="+", help="context-parallel sizes (2 to 1,024; all that divide"
                       " the ranks)")  # fmt: skip
    found.add_argument("--tokens-per-rank", type=int, default=16384, help="(%(default)s)")
    found.add_argument("--total-tokens", type=int, help="tokens of every measured window, whatever the ranks")
    found.add_argument(
        "--workloads",
        nargs="+",
        default=["file", "uniform", "short"],
        choices=WORKLOADS,
        help="documents to measure (%(default)s)",
    )
    found.add_argument(
        "--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS, help="to measure"
    )
    found.add_argument(
        "--exchanges", nargs="+", default=list(EXCHANGES), choices=EXCHANGES, help="to measure"
    )
    found.add_argument("--repeats", type=int, default=10, help="timed repeats, of which the median counts")
    found.add_argument("--windows", type=int, default=20, help="simulated windows of each size (%(default)s)")
    found.add_argument("--parts", type=int, default=4, help="documents are cut at 1/parts of a window")
    found.add_argument(
        "--ranks-per-node", type=int, help="neighbouring ranks of a node; all of one by default"
    )
    found.add_argument(
        "--heads", nargs="+", default=["32/8"], help="query/key-value heads of a rank (%(default)s)"
    )
    found.add_argument("--head-dim", type=int, default=128, help="(%(default)s)")
    found.add_argument("--ring-rows", type=int, default=16384, help="rows of a round of ring (%(default)s)")
    found.add_argument("--calibration", type=Path, help="JSON of --measure, whose rates to take")
    found.add_argument("--output", type=Path, default=Path("build/profile_cp"), help="(%(default)s)")
    return found


def check_options(given: argparse.Namespace) -> None:
    """ValueError for an option that would be ignored."""
    unused = (
        ("windows",) if given.measure else ("workloads", "placements", "exchanges", "repeats", "total_tokens")
    )
    for name in unused:
        if getattr(given, name) != parser().get_default(name):
            other = "--simulate" if given.measure else "--measure"
            raise ValueError(f"--{name.replace('_', '-')}: is an option of {other} alone")
    if given.simulate and len(given.heads) > 1:
        raise ValueError(f"--heads: got {len(given.heads)} shapes, expected one for --simulate")


def shapes(given: argparse.Namespace, bytes_per_value: int = 2) -> list[LayerShape]:
    """The layers asked for by --heads and --head-dim."""
    found = []
    for text in given.heads:
        heads, _, groups = text.partition("/")
        if not (heads.isdigit() and groups.isdigit() and int(groups) and int(heads) % int(groups) == 0):
            raise ValueError(f"--heads: got {text!r}, expected query/key-value heads such as 32/8")
        found.append(LayerShape(int(heads), int(groups), given.head_dim, bytes_per_value))
    return found


def run_simulation(given: argparse.Namespace) -> None:
    """Prints the tables and writes JSON and report."""
    machine = read_machine(given.calibration) if given.calibration else Machine()
    costs = CostModel(machine, shapes(given)[0], given.ranks_per_node)
    settings = Settings(
        given.lengths, costs, given.ring_rows, given.tokens_per_rank, given.windows, given.parts
    )
    rows: list[dict[str, Any]] = []
    for ranks in given.cp or RANKS:
        rows += simulate(settings, ranks)
        print(f"\r{ranks} ranks", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(placement_table(rows), prediction_table(rows), sep="\n\n")
    finish(given, environment() | {"kind": "simulate", **described(given, costs), "rows": rows})


def run_measurement(given: argparse.Namespace) -> None:
    """Measures on all ranks; the first prints the table and the fitted rates and writes JSON and report."""
    import torch.distributed as dist

    from anchor_megatron.profiling.sweep import Sweep, add_predictions, sweep

    device = start_ranks()
    world = dist.get_world_size()
    sizes = given.cp or [size for size in range(1, world + 1) if world % size == 0]
    if wrong := [size for size in sizes if world % size]:
        raise ValueError(f"--cp: got {wrong[0]}, expected a divisor of the number of ranks = {world}")
    before = read_machine(given.calibration) if given.calibration else Machine()
    settings = Sweep(
        given.lengths, given.workloads, shapes(given, 2 if device.type == "cuda" else 4), sizes,
        given.placements, given.exchanges, given.tokens_per_rank, given.total_tokens, given.parts,
        given.repeats, device, before, given.ranks_per_node, given.ring_rows,
    )  # fmt: skip
    results = environment() | {"kind": "measure", **described(given, CostModel(before, settings.shapes[0]))}
    results["tokens_per_rank"] = None if given.total_tokens else given.tokens_per_rank
    first = dist.get_rank() == 0

    def said(rows: list[dict[str, Any]]) -> None:
        if first:
            print(measured_line(rows[-1]), flush=True)
            write_results(given.output.with_suffix(".json"), results | {"rows": rows})

    rows, samples = sweep(settings, said)
    machine = add_predictions(rows, samples, settings)
    if first:
        print("", measured_table(rows), "", "fitted: " + json.dumps(asdict(machine)), sep="\n")
        finish(given, results | {"machine": asdict(machine), "rows": rows})
    dist.destroy_process_group()


def start_ranks() -> Any:
    """The process group, and this rank's device."""
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        raise ValueError("--measure: run it under torchrun, e.g. torchrun --nproc-per-node 2")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    if importlib.util.find_spec("transformer_engine"):
        import transformer_engine.pytorch  # noqa: F401 (before anything that touches cuDNN)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # as in training
    dist.init_process_group("nccl", device_id=device, pg_options=options)
    return device


def described(given: argparse.Namespace, costs: CostModel) -> dict[str, Any]:
    """What the rows were made with, for JSON and report."""
    return {
        "lengths": given.lengths.name,
        "tokens_per_rank": given.tokens_per_rank,
        "total_tokens": given.total_tokens,
        "windows": given.windows,
        "parts": given.parts,
        "ranks_per_node": given.ranks_per_node,
        "ring_rows": given.ring_rows,
        "shape": asdict(costs.shape),
        "machine": asdict(costs.machine),
    }


def finish(given: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes JSON and report."""
    write_results(given.output.with_suffix(".json"), results)
    write_report(given.output.with_suffix(".html"), results)
    print(f"\nwritten: {given.output.with_suffix('.json')}, {given.output.with_suffix('.html')}")


if __name__ == "__main__":
    sys.exit(main())
