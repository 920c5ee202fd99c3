"""What the fault tests share: a small data set, a small run on it, and ways to break both.

A run of 8 steps on two context-parallel ranks that saves every 2; what it must come to after any fault is
what the undisturbed one came to: the same losses, and the same bytes in the last checkpoint's tensor files.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from anchor_megatron.config import Config
from anchor_megatron.data.preprocess import Job, preprocess
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.testing.texts import write_paragraphs

STEPS, INTERVAL, RANKS = 8, 2, 2

# places to die at: module and name of a function, in which a rank is killed as it enters or leaves
POINTS = {
    "step": ("anchor_megatron.training.loop", "train_step"),
    "exchange": ("anchor_megatron.attention.exchange", "dist.all_to_all_single"),
    "optimizer": ("anchor_megatron.training.step", "finalize_gradients"),
    "planning of a save": ("anchor_megatron.training.checkpoint", "sharded_state"),
    "asynchronous save": ("anchor_megatron.training.async_save", "ThreadedStrategy._write_file"),
    "checksums": ("anchor_megatron.training.async_save", "entry_of"),
    "manifest": ("anchor_megatron.training.checkpoint", "write_manifest"),
    "commit rename": ("anchor_megatron.training.checkpoint", "Path.rename"),
    "deletion of an old one": ("anchor_megatron.training.checkpoint_find", "shutil.rmtree"),
    "resuming": ("anchor_megatron.training.loop", "load_checkpoint"),
}


def make_data(folder: Path) -> Path:
    """The standard library's json package, a paragraph a document; returns the prefix."""
    prefix = folder / "set"
    text = write_paragraphs(prefix.with_suffix(".jsonl"))
    job = Job((text,), prefix, train_tokenizer=300, overwrite=True, source_from="file")
    preprocess(job)
    return prefix


def configuration(prefix: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    """A run on `prefix` that saves and reports into `folder`."""
    given: dict[str, dict[str, Any]] = dict(
        parallel=dict(context=RANKS),
        data=dict(train=str(prefix), seq_length=128, num_workers=0),
        train=dict(steps=STEPS, global_batch_size=2, precision="fp32"),
        optimizer=dict(lr=1e-3, warmup_steps=3, decay="cosine"),
        checkpoint=dict(directory=str(folder), save_interval=INTERVAL, keep_last=2),
        log=dict(jsonl=str(folder / "metrics.jsonl"), peak_tflops=1.0),
    )
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return tiny_config(vocab_size=300, **given)


def losses(config: Config) -> dict[int, list[float]]:
    """Losses by step; more than one where a step was taken again."""
    found: dict[int, list[float]] = {}
    for line in Path(str(config.log.jsonl)).read_text().splitlines():
        report = json.loads(line)
        found.setdefault(report["step"], []).append(report["loss"])
    return found


def last_tensors(config: Config) -> dict[str, str]:
    """SHA-256 of the tensor files of the run's last checkpoint."""
    manifest = Path(str(config.checkpoint.directory)) / f"step_{config.train.steps:07d}" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def assert_same_run(found: Config, expected: Config) -> None:
    """Every loss of every attempt, and the last tensors, bit for bit."""
    wanted = {step: values[0] for step, values in losses(expected).items()}
    assert losses(found).keys() == wanted.keys()
    for step, values in losses(found).items():
        assert set(values) == {wanted[step]}, f"step {step}: got {values}, expected {wanted[step]}"
    assert last_tensors(found) == last_tensors(expected)


@contextlib.contextmanager
def dying_at(point: str, *, call: int, leaving: bool) -> Iterator[None]:
    """Kills this process with SIGKILL as it enters or leaves the `call`-th call (from 1) of a point's
    function.
    """
    module, name = POINTS[point]
    target = f"{module}.{name}"
    parent, attribute = mock._get_target(target)  # type: ignore[attr-defined]
    original, calls = getattr(parent(), attribute), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        reached = next(calls) == call  # writers come here at the same time
        if reached and not leaving:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if reached:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with mock.patch(target, dying):
        yield


def listening(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What a function returns, and all that it prints and logs."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        result = function(*args)
    return result, heard.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is heard of what the block prints and logs."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


@contextlib.contextmanager
def dying_after(seconds: float) -> Iterator[None]:
    """Kills this process with SIGKILL after so long, wherever in the block it stands."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# a way to damage a file: its bytes and a source of randomness give what it holds then (None: it is gone)
Damage = Callable[[bytes, random.Random], "bytes | None"]
Opens = Callable[[], object]


def truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def flip(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def blank(content: bytes, dice: random.Random) -> bytes:
    begin = dice.randrange(len(content))
    end = min(len(content), begin + 512)
    return content[:begin] + bytes(end - begin) + content[end:]


def grow(content: bytes, dice: random.Random) -> bytes:
    return content + dice.randbytes(1 + dice.randrange(64))


def remove(content: bytes, dice: random.Random) -> None:
    return None


DAMAGES: dict[str, Damage] = {
    "truncated": truncate, "bit flipped": flip, "block zeroed": blank, "grown": grow, "removed": remove
}  # fmt: skip


def apply(damage: Damage, path: Path, dice: random.Random) -> bool:
    """Damages the file; False where that happened to change nothing."""
    content = path.read_bytes()
    damaged = damage(content, dice)
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    return damaged != content
