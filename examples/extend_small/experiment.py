"""Does anchor attention help a small model reach a longer context? Trained, extended, judged within minutes.

    CUDA_VISIBLE_DEVICES=0 python examples/extend_small/experiment.py --data build/extend_small --seed 1 \
        --output seed1.json

One process, one GPU, one seed: a model is trained from scratch at the short length; from its weights each
mode extends it to the long one, with as many tokens, the same documents and the paper's rotary base for up to
64K tokens; every model is judged (needles, loss by position, loss on short documents). The numbers of steps
come from measured speeds and the seconds allowed, so that a run's length is known in advance. JSON is written
as it goes.
`collect.py` and `tools/preprocess_data.py` make the data: train.bin, .idx and .json, and a folder held_out/.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from anchor_megatron import cpu

warnings.simplefilter("ignore")  # Megatron-Core's, about packages that are not needed here
if not torch.cuda.is_available():
    cpu.install()

from anchor_megatron.config import Config, load_config  # noqa: E402
from anchor_megatron.data.tokenizer import batch_encoder, encoder_source, load_tokenizer  # noqa: E402
from anchor_megatron.evaluation.haystack import Haystack, read_documents  # noqa: E402
from anchor_megatron.evaluation.judge import judge_needles  # noqa: E402
from anchor_megatron.evaluation.perplexity import loss_by_position, short_loss  # noqa: E402
from anchor_megatron.evaluation.reader import Reader  # noqa: E402
from anchor_megatron.layout.modes import MODES  # noqa: E402
from anchor_megatron.training.batch import PlannedBatch  # noqa: E402
from anchor_megatron.training.loader import batches, open_windows  # noqa: E402
from anchor_megatron.training.loop import complete  # noqa: E402
from anchor_megatron.training.setup import initialize_ranks  # noqa: E402
from anchor_megatron.training.step import Trainee, build_trainee, train_step  # noqa: E402

TASKS = ("single", "multi_key", "multi_value", "multi_query", "tracking", "common", "frequent", "distractors")
ATTENTION = ("flash", "cudnn_generated", "sdpa", "fmha")  # in the names of attention's kernels


def main() -> None:
    """Runs the phases in order."""
    given = _parser().parse_args()
    found: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(given).items()}}
    short, long = configurations(given)
    found |= {"pretrain_config": dataclasses.asdict(short), "extend_config": dataclasses.asdict(long)}
    initialize_ranks(short)
    judge = Judge(given, long)
    started = time.perf_counter()

    def note(key: str, value: Any) -> None:
        found[key] = value
        found["seconds"] = time.perf_counter() - started
        given.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{found['seconds']:7.1f} s  {key}", flush=True)

    note("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    untrained = build_trainee(short)
    note("judged untrained", judge(untrained, lengths=given.lengths[:1]))  # chance, and a rehearsal
    del untrained
    short = with_steps(short, given.pretrain_seconds, speed(short)["seconds_per_step"])
    trainee, log = train(short, None)
    note("pretrain", log)
    base = [parameter.detach().clone() for parameter in trainee.gpt.parameters()]
    note("judged base", judge(trainee))
    del trainee
    speeds = {mode: speed(in_mode(long, mode)) for mode in given.modes}
    note("speed", speeds)
    slowest = max(one["seconds_per_step"] for one in speeds.values())
    long = with_steps(long, given.extend_seconds, slowest)
    for mode in given.modes:
        trainee, log = train(in_mode(long, mode), base)
        note(f"extend {mode}", log)
        note(f"judged {mode}", judge(trainee))
        del trainee
    for length in given.speed_lengths:
        config = one_window(long, length)
        note(f"speed {length}", {mode: speed(in_mode(config, mode)) for mode in ("full", "anchor")})
    note("finished", True)


def configurations(given: argparse.Namespace) -> tuple[Config, Config]:
    """Pre-training and extension: the files beside this one with what the command line says."""
    folder = Path(__file__).parent
    words = [f"data.train={given.data / 'train'}", f"train.seed={given.seed}"]
    return (
        complete(load_config(folder / f"{given.size}_pretrain.yaml", words)),
        complete(load_config(folder / f"{given.size}_extend.yaml", words)),
    )


def in_mode(config: Config, mode: str) -> Config:
    """The same run in another mode."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mode=mode))


def one_window(config: Config, length: int) -> Config:
    """The same run with one window of another length a step."""
    train = dataclasses.replace(config.train, micro_batch_size=1, global_batch_size=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=length), train=train)


def with_steps(config: Config, seconds: float, seconds_per_step: float) -> Config:
    """As many steps as there is time for."""
    steps = max(2, int(seconds / seconds_per_step))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def train(config: Config, base: list[torch.Tensor] | None) -> tuple[Trainee, dict[str, Any]]:
    """All steps of a run from the weights `base` (its own initial ones where None), and what they showed."""
    windows = open_windows(config)
    trainee = build_trainee(config)
    if base is not None:
        for parameter, value in zip(trainee.gpt.parameters(), base, strict=True):
            parameter.data.copy_(value)
        trainee.optimizer.reload_model_params()
    trainee.gpt.train()
    source = batches(config, windows, first_step=0, pin_memory=torch.cuda.is_available())
    losses, tokens, started = [], 0, _now()
    for _ in range(config.train.steps):
        result = train_step(config, trainee, source)
        losses.append(result.loss)
        tokens += sum(one.counts.tokens for one in result.stats)
    seconds = _now() - started
    each = torch.stack(losses)
    log = {
        "losses": (each[:, 0] / each[:, 1]).tolist(),
        "steps": config.train.steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    return trainee, log


def speed(config: Config, *, warm_up: int = 4, steps: int = 6) -> dict[str, Any]:
    """Seconds a step, tokens a second and attention's share of the GPU's time, of a model not kept."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=warm_up + steps + 1))
    trainee = build_trainee(config)
    ready = iter(
        list(batches(config, open_windows(config), first_step=0, pin_memory=torch.cuda.is_available()))
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        train_step(config, trainee, ready)
    started, tokens = _now(), 0
    for _ in range(steps):
        tokens += sum(one.counts.tokens for one in train_step(config, trainee, ready).stats)
    seconds = _now() - started
    found: dict[str, Any] = {"seconds_per_step": seconds / steps, "tokens_per_second": tokens / seconds}
    if torch.cuda.is_available():
        found["attention_share"] = attention_share(config, trainee, ready)
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    del trainee
    gc.collect()
    torch.cuda.empty_cache()
    return found


def attention_share(config: Config, trainee: Trainee, source: Iterator[PlannedBatch]) -> float:
    """Attention kernels' part of the time that one step's kernels take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        train_step(config, trainee, source)
        torch.cuda.synchronize()
    times = {event.key.lower(): event.self_device_time_total for event in profiler.key_averages()}
    attention = sum(time for name, time in times.items() if any(word in name for word in ATTENTION))
    return float(attention / sum(times.values()))


class Judge:
    """What every model is asked: the same held-out text, samples and documents."""

    def __init__(self, given: argparse.Namespace, long: Config) -> None:
        folder = Path(f"{given.data / 'train'}_tokenizer")
        self.encode = batch_encoder(encoder_source(load_tokenizer(folder), folder))
        self.haystack = Haystack(given.data / "held_out", self.encode)
        documents = read_documents(given.data / "held_out", self.encode)
        self.longest = long.data.seq_length
        self.long = [one for one in documents if one.size >= self.longest][: given.long_documents]
        self.short = [one for one in documents if one.size >= given.window][: 4 * given.long_documents]
        self.anchor = open_windows(long).leads.anchor
        self.given = given

    def __call__(self, trainee: Trainee, lengths: list[int] | None = None) -> dict[str, Any]:
        """Needles at every length, loss by position and on short documents."""
        reader, started = Reader(trainee.gpt), _now()
        needles = judge_needles(
            reader, self.haystack, tasks=TASKS, lengths=lengths or self.given.lengths,
            samples=self.given.samples, depths=5, anchor=self.anchor, seed=7, decode=None,
        )  # fmt: skip
        losses = loss_by_position(
            reader, self.long, length=self.longest, window=self.given.window, anchor=self.anchor
        )
        short = short_loss(reader, self.short, window=self.given.window, anchor=self.anchor)
        return {
            "needles": [dataclasses.asdict(one) for one in needles],
            "by_position": dataclasses.asdict(losses),
            "figures": {"short_loss": short, "seconds": _now() - started},
        }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.bin, .idx, .json and held_out/")
    add("--seed", type=int, default=1)
    add("--size", default="gpu", choices=("gpu", "cpu"), help="which configurations beside this file")
    add("--pretrain-seconds", type=float, default=120)
    add("--extend-seconds", type=float, default=45, help="of the slowest mode (%(default)s)")
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--lengths", nargs="+", type=int, default=[2048, 8192, 16384, 32768], help="of needle contexts")
    add("--window", type=int, default=2048, help="of sliding and short losses (%(default)s)")
    add("--samples", type=int, default=3, help="of every task and length (%(default)s)")
    add("--long-documents", type=int, default=8, help="read whole (%(default)s)")
    add("--speed-lengths", nargs="*", type=int, default=[131072], help="at which full and anchor are timed")
    add("--output", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
