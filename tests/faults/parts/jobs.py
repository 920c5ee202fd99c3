"""Whole jobs under torchrun: two with one output folder, and one on two "nodes" of which one is cut off."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from faults import scenes
from faults.parts import Part

from anchor_megatron.config import save_config

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(config: Path, output: Path) -> subprocess.Popen:
    """A job of two ranks; what it says goes to `output`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    with output.open("w") as file:
        return subprocess.Popen(
            [*torchrun, str(ROOT / "pretrain_anchor.py"), str(config)],
            stdout=file,
            stderr=file,
            env=ENVIRONMENT,
        )


def wait_for(reached: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def two_jobs(data: Path, folder: Path) -> Part:
    """The second is started once the first has saved; the first is then asked to stop."""
    folder.mkdir()
    run, outputs = folder / "run", [folder / "first.txt", folder / "second.txt"]
    config = scenes.configuration(data, run, train=dict(steps=1_000_000), checkpoint=dict(save_interval=20))
    save_config(config, folder / "run.yaml")
    first = start(folder / "run.yaml", outputs[0])
    try:
        wait_for(
            lambda: list(run.glob("step_*0")) or first.poll() is not None, 120, "the first job's checkpoint"
        )
        status = start(folder / "run.yaml", outputs[1]).wait(timeout=120)
        refused = re.search(
            r"lock.json: got a folder that process \d+ on .* is writing to", outputs[1].read_text()
        )
        ranks = [one for one in psutil.Process(first.pid).children() if "pretrain" in " ".join(one.cmdline())]
        ranks[0].send_signal(signal.SIGTERM)
        ended = first.wait(timeout=120)
    finally:
        first.kill()
    outcome = json.loads((run / "outcome.json").read_text())
    once = all(len(values) == 1 for values in scenes.losses(config).values())
    part = Part()
    part.add(
        "two torchrun jobs, one output folder",
        f"the second refuses, the first takes {outcome['step']} steps, each once, and stops in order",
        ok=bool(refused) and status != 0 and ended == 0 and once and outcome["outcome"] == "stopped",
        second_exit_code=status, first_steps=outcome["step"],
    )  # fmt: skip
    return part


def two_nodes(data: Path, folder: Path) -> Part:
    """`two_nodes.sh`, where this machine allows network namespaces."""
    part, what = (
        Part(),
        "two nodes (network namespaces) under torchrun's rendezvous, one cut off and brought back",
    )
    allowed = subprocess.run(
        "ip netns add anchor-try && ip netns del anchor-try", shell=True, capture_output=True
    )
    if allowed.returncode:
        part.add(what, f"not tried: {allowed.stderr.decode().strip() or 'no network namespaces'}", ok=True)
        return part
    script = Path(__file__).resolve().parents[1] / "two_nodes.sh"
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    began = time.monotonic()
    done = subprocess.run(
        [str(script), str(data), str(folder)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | path,
        timeout=600,
    )
    seconds = time.monotonic() - began
    print("    " + done.stdout.strip().replace("\n", "\n    ") + done.stderr)
    if done.returncode:
        part.add(what, f"failed with exit code {done.returncode}", ok=False)
        return part
    outcome = json.loads((folder / "outcome.json").read_text())
    resumed = re.search(r"resumed from \S*?(step_\d+)", done.stdout)
    found = f"resumed from {resumed[1] if resumed else '?'}, {outcome['outcome']} at step {outcome['step']}"
    part.add(what, found, ok=resumed is not None, restarts=outcome["restarts"], seconds=round(seconds))
    return part
