"""Context parallelism predicted for any number of ranks, or measured on those at hand: tables, JSON, a report.

    python tools/profile_cp.py --simulate
    python tools/profile_cp.py --simulate --lengths my_lengths.txt --cp 8 64 --ranks-per-node 8
    torchrun --nproc-per-node 2 tools/profile_cp.py --measure --output build/measured
    python tools/profile_cp.py --simulate --calibration build/measured.json

Writes OUTPUT.json and OUTPUT.html, which opens without a network. docs/scaling.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anchor_megatron.layout.cost import CostModel, LayerShape, Machine, read_machine
from anchor_megatron.profiling.report import write_report
from anchor_megatron.profiling.simulate import RANKS, Settings, simulate
from anchor_megatron.profiling.table import placement_table, prediction_table
from anchor_megatron.testing.timing import write_results

LENGTHS = Path(__file__).resolve().parent.parent / "benchmarks" / "document_lengths.csv"


def main() -> int:
    """Returns the process's exit status."""
    given = parser().parse_args()
    try:
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
    found.add_argument("--windows", type=int, default=20, help="simulated windows of each size (%(default)s)")
    found.add_argument("--parts", type=int, default=4, help="documents are cut at 1/parts of a window")
    found.add_argument(
        "--ranks-per-node", type=int, help="neighbouring ranks of a node; all of one by default"
    )
    found.add_argument(
        "--heads", nargs="+", default=["32/8"], help="query/key-value heads of a rank (%(default)s)"
    )
    found.add_argument("--head-dim", type=int, default=128, help="(%(default)s)")
    found.add_argument("--calibration", type=Path, help="JSON of --measure, whose rates to take")
    found.add_argument("--output", type=Path, default=Path("build/profile_cp"), help="(%(default)s)")
    return found


def shapes(given: argparse.Namespace) -> list[LayerShape]:
    """The layers asked for by --heads and --head-dim."""
    found = []
    for text in given.heads:
        heads, _, groups = text.partition("/")
        if not (heads.isdigit() and groups.isdigit() and int(groups) and int(heads) % int(groups) == 0):
            raise ValueError(f"--heads: got {text!r}, expected query/key-value heads such as 32/8")
        found.append(LayerShape(int(heads), int(groups), given.head_dim))
    return found


def run_simulation(given: argparse.Namespace) -> None:
    """Prints the tables and writes JSON and report."""
    machine = read_machine(given.calibration) if given.calibration else Machine()
    costs = CostModel(machine, shapes(given)[0], given.ranks_per_node)
    settings = Settings(given.lengths, costs, given.tokens_per_rank, given.windows, given.parts)
    rows: list[dict[str, Any]] = []
    for ranks in given.cp or RANKS:
        rows += simulate(settings, ranks)
        print(f"\r{ranks} ranks", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(placement_table(rows), prediction_table(rows), sep="\n\n")
    finish(given, {"kind": "simulate", **described(given, costs), "rows": rows})


def described(given: argparse.Namespace, costs: CostModel) -> dict[str, Any]:
    """What the rows were made with, for JSON and report."""
    return {
        "lengths": given.lengths.name,
        "tokens_per_rank": given.tokens_per_rank,
        "windows": given.windows,
        "parts": given.parts,
        "ranks_per_node": given.ranks_per_node,
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
