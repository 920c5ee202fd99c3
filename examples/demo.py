"""The main job from end to end, in minutes, without a GPU: `make demo`.

Trains a tokenizer on the Python standard library's sources, writes the data set, trains a small GPT with
anchor attention on two context-parallel ranks, stops half way, resumes on one rank from the checkpoint, draws
the loss curve and the plan of one window, and hands the model to transformers, which generates from it.
Everything lands in build/demo/.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo"
STEPS, STOP_AFTER = 40, 24


def main() -> int:
    """Returns the process's exit status: 0 only where the loss fell and both pictures were drawn."""
    started = time.perf_counter()
    shutil.rmtree(BUILD, ignore_errors=True)
    prepare_data()
    pretrain(ranks=2, steps=STEPS, stop_after=STOP_AFTER)
    pretrain(ranks=1, steps=STEPS, stop_after=STEPS)
    losses = read_losses()
    draw_losses(losses, BUILD / "loss.png")
    draw_plan(BUILD / "plan.png")
    export_and_generate(BUILD / "huggingface")
    first, last = losses[0], sum(losses[-5:]) / 5
    print(
        f"loss {first:.3f} -> {last:.3f} in {STEPS} steps, {time.perf_counter() - started:.0f} s; see {BUILD}"
    )
    if last > first - 1.0:
        print("the loss did not fall by 1", file=sys.stderr)
        return 1
    return 0


def run(*command: str | Path) -> None:
    """Runs a command of the project from its root, showing it; a failure ends the demo."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def prepare_data() -> None:
    """Tokenizer and data set from the standard library's own sources."""
    sources = Path(sysconfig.get_paths()["stdlib"])
    folders = [sources / name for name in ("asyncio", "email", "http", "json", "logging", "unittest", "xml")]
    run(sys.executable, "tools/preprocess_data.py", *folders, "--suffix", ".py", "--train-tokenizer", "4096",
        "--output", BUILD / "data" / "stdlib", "--workers", "2")  # fmt: skip


def pretrain(*, ranks: int, steps: int, stop_after: int) -> None:
    """Trains on `ranks` context-parallel ranks, from the newest checkpoint where there is one."""
    run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "pretrain_anchor.py", "examples/demo.yaml", f"parallel.context={ranks}", f"train.steps={steps}",
        f"train.stop_after={stop_after}")  # fmt: skip


def read_losses() -> list[float]:
    """The loss of every step, in order."""
    lines = (BUILD / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def draw_losses(losses: list[float], path: Path) -> None:
    """The loss curve, with the place where two ranks became one."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.axvline(STOP_AFTER + 0.5, linestyle="--", color="grey")
    axes.text(
        STOP_AFTER + 0.7, losses[0], "stopped on 2 ranks (CP 2),\nresumed on 1", verticalalignment="top"
    )
    axes.set(
        xlabel="step", ylabel="loss (nats a token)", title="AnchorAttention on the standard library's sources"
    )
    figure.savefig(path, dpi=120)


def draw_plan(path: Path) -> None:
    """Who holds what and who sends what to whom, in the first window of the data, as for four ranks."""
    run(sys.executable, "tools/show_plan.py", "--data", BUILD / "data" / "stdlib", "--seq-length", "2048",
        "--window", "0", "--cp", "4", "--plot", path)  # fmt: skip


def export_and_generate(folder: Path) -> None:
    """The trained model as a Hugging Face folder, and a few tokens that transformers generates with it."""
    run(sys.executable, "tools/convert_checkpoint.py", "export", "--megatron", BUILD / "checkpoints",
        "--out", folder)  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(f"{tokenizer.bos_token}import ", return_tensors="pt")["input_ids"]
    generated = model.generate(prompt, max_new_tokens=24, do_sample=False)
    print("transformers goes on:", repr(tokenizer.decode(generated[0])))


if __name__ == "__main__":
    sys.exit(main())
