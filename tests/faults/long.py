"""The fault suite's long form: many kills and corruptions, drawn from a seed, and what became of them.

    python tests/faults/long.py                       all of it: ten minutes on two cores, without a GPU
    python tests/faults/long.py --only kills disks    parts of it

Each line, a row of a Markdown table, says what was done and what became of it; the exit status is 1 where
anything was lost, diverged or went unnoticed. `--json` keeps the lines and the figures in them, and what the
file has of parts that were not run; docs/reliability.md shows the lines of benchmarks/results/faults.json.
Real disks and two "nodes" are tried by root on Linux; for others these are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# as pytest does, for processes of `run_ranks` too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import scenes
from faults.parts import Part
from faults.parts.damage import corruptions, fuzz
from faults.parts.disks import disks
from faults.parts.jobs import two_jobs, two_nodes
from faults.parts.kills import kills, preprocessing
from faults.parts.steps import steps

from anchor_megatron.testing.ranks import close_ranks

PARTS = ("kills", "preprocessing", "corruptions", "disks", "fuzz", "steps", "two_jobs", "two_nodes")


def parts(given: argparse.Namespace, data: Path, folder: Path) -> dict[str, Callable[[], Part]]:
    """Each draws from dice of its own, so that it is the same alone."""
    of_preprocessing = given.kills // 10
    dice = {name: random.Random(f"{given.seed} {name}") for name in PARTS}
    return {
        "kills": lambda: kills(given.kills - of_preprocessing, data, folder / "kills", dice["kills"]),
        "preprocessing": lambda: preprocessing(
            of_preprocessing, data, folder / "preprocessing", dice["preprocessing"]
        ),
        "corruptions": lambda: corruptions(
            given.corruptions, data, folder / "corruptions", dice["corruptions"]
        ),
        "disks": lambda: disks(data, folder / "disks"),
        "fuzz": lambda: fuzz(given.cases, folder / "fuzz"),
        "steps": lambda: steps(given.steps, data, folder / "steps"),
        "two_jobs": lambda: two_jobs(data, folder / "two_jobs" / "jobs"),
        "two_nodes": lambda: two_nodes(data, folder / "two_nodes" / "run"),
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("kills", 40), ("corruptions", 200), ("steps", 2000), ("cases", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--json", type=Path, help="where to keep what was found")
    return parser.parse_args()


def main() -> int:
    """Returns the process's exit status."""
    given, good = read_arguments(), True
    kept: dict[str, object] = {}
    if given.json and given.json.is_file():
        kept = json.loads(given.json.read_text())
    packages = {name: version(name) for name in ("torch", "megatron-core", "hypothesis")}
    kept |= {"versions": {"python": platform.python_version()} | packages, "seed": given.seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("data", *PARTS):
            (folder / part).mkdir()
        with scenes.quiet():
            data = scenes.make_data(folder / "data")
        for name, run in parts(given, data, folder).items():
            if name not in given.only:
                continue
            began = time.monotonic()
            part = run()
            close_ranks()
            seconds = round(time.monotonic() - began)
            print(f"    ({name} took {seconds} s)", flush=True)
            good &= part.good
            about = {"date": datetime.date.today().isoformat(), "seconds": seconds, "good": part.good}
            kept[name] = about | {"rows": part.rows} | part.figures
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
