"""What a run says of itself: a line on the console, the same figures to JSONL, TensorBoard and W&B.

Every rank adds its share to one small all-reduce; the first rank writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from anchor_megatron.config import Config
from anchor_megatron.data.window import WindowCounts
from anchor_megatron.model.builder import rank_device
from anchor_megatron.training.evaluation import HELD_OUT
from anchor_megatron.training.flops import peak_tflops, step_flops
from anchor_megatron.training.prometheus import Prometheus
from anchor_megatron.training.step import StepResult

__all__ = ["Reporter", "global_sums"]

_log = logging.getLogger(__name__)


class Reporter:
    """Collects steps and reports every `log.interval` of them. All ranks call `step` together.

    further: gives more figures of the steps since the last report (`data_wait_ms`), on all ranks together.
    """

    def __init__(self, config: Config, further: Callable[[list[StepResult]], dict[str, Any]]) -> None:
        self.config, self.further = config, further
        self.peak = peak_tflops(config.log.peak_tflops)
        self.pending: list[StepResult] = []
        self.watched: dict[str, float] = {}
        self.started = time.perf_counter()
        self.sinks = _sinks(config) if dist.get_rank() == 0 else []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time that passes inside out of the steps'."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        learning_rate: float,
        held_out: dict[str, float],
        watched: dict[str, float],
    ) -> dict[str, Any] | None:
        """Takes in step `step` (1 is the first); on a reporting step, and wherever there are `held_out`
        losses to report with them, returns the figures since the last, the newest `watched` ones (see
        `monitor.py`) among them.
        """
        self.pending.append(result)
        self.watched |= watched
        last = step in (self.config.train.steps, self.config.train.stop_after)
        if step % self.config.log.interval and not last and not held_out:
            return None
        sums = global_sums(self.pending)
        now = time.perf_counter()
        figures = self._figures(step, sums, seconds=now - self.started) | {"learning_rate": learning_rate}
        figures |= held_out | self.watched | self.further(self.pending)
        self.started, self.pending, self.watched = now, [], {}
        for sink in self.sinks:
            with _outlived():
                sink(figures)
        return figures

    def restart(self) -> None:
        """Leaves out the steps and the time since the last report."""
        self.started, self.pending, self.watched = time.perf_counter(), [], {}

    def close(self) -> None:
        """Flushes and closes what reports are written to."""
        for sink in self.sinks:
            with _outlived():
                getattr(sink, "close", lambda: None)()

    def _figures(self, step: int, sums: dict[str, float], *, seconds: float) -> dict[str, Any]:
        steps, config = len(self.pending), self.config
        rows = config.data.seq_length * config.train.global_batch_size * steps
        flops = step_flops(config.model, tokens=rows, area=int(sums["area"]))
        tflops = flops / seconds / dist.get_world_size() / 1e12
        micro_batches = sums["micro_batches"]
        shares = micro_batches * parallel_state.get_context_parallel_world_size()
        return {
            "step": step,
            "loss": sums["loss"] / max(sums["loss_tokens"], 1.0),
            "grad_norm": self.pending[-1].grad_norm,
            "seconds_per_step": seconds / steps,
            "tokens_per_second": sums["tokens"] / seconds,
            "tflops_per_rank": tflops,
            "mfu": None if self.peak is None else tflops / self.peak,
            "loss_tokens": int(sums["loss_tokens"]),
            "tokens": int(sums["tokens"]),
            "documents": int(sums["pieces"]),
            "cut_documents": int(sums["cut"]),
            "joined_documents": int(sums["joined"]),
            "dropped_documents": int(sums["dropped"]),
            "tag_tokens": int(sums["tags"]),
            "padding_tokens": int(sums["padding"]),
            "balance": sums["balance"] / micro_batches,
            "batch_balance": batch_balance(self.pending),
            "received_tokens_per_rank": sums["received"] / shares,
            "skipped_steps": sum(not result.updated for result in self.pending),
        }


def global_sums(results: list[StepResult]) -> dict[str, float]:
    """Loss and batch figures summed over all ranks, each counted once (one all-reduce over the world)."""
    first_replica = (
        parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage()
    )
    whole = first_replica and parallel_state.get_context_parallel_rank() == 0
    stats = [one for result in results for one in result.stats]
    shared = {
        **{
            entry.name: sum(getattr(one.counts, entry.name) for one in stats)
            for entry in dataclasses.fields(WindowCounts)
        },
        "area": sum(one.area for one in stats),
        "balance": sum(one.balance for one in stats),
        "micro_batches": len(stats),
    }
    own = {"received": sum(one.received_tokens for one in stats)}
    counted = torch.tensor(
        [*(value * whole for value in shared.values()), *(value * first_replica for value in own.values())],
        dtype=torch.float64,
    )
    loss = torch.stack([result.loss for result in results]).sum(dim=0).double() * first_replica
    total = torch.cat((counted.to(rank_device()), loss))
    dist.all_reduce(total)
    return dict(zip([*shared, *own, "loss", "loss_tokens"], total.tolist(), strict=True))


def batch_balance(results: list[StepResult]) -> float:
    """The largest micro-batch's attention area over the mean one's, among all replicas, as a mean over steps:
    what replicas wait for each other in a step (two all-reduces over the world).
    """
    areas = torch.tensor([[one.area for one in result.stats] for result in results], dtype=torch.float64)
    means = areas.mean(dim=1).to(rank_device())
    largest = areas.amax(dim=1).to(rank_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(means)
    return float((largest * dist.get_world_size() / means).mean())


@contextlib.contextmanager
def _outlived() -> Iterator[None]:
    """A disk that is full or gone must not end the run here: saving a checkpoint will say so."""
    try:
        yield
    except OSError as error:
        _log.warning("a report could not be written: %s", error)


def _sinks(config: Config) -> list[Any]:
    sinks: list[Any] = [_console]
    if config.log.jsonl:
        sinks.append(_JsonLines(Path(config.log.jsonl)))
    if config.log.tensorboard:
        sinks.append(_TensorBoard(config.log.tensorboard))
    if config.log.wandb_project:
        sinks.append(_WeightsAndBiases(config))
    if config.log.prometheus:
        sinks.append(Prometheus(Path(config.log.prometheus)))
    return sinks


def _console(figures: dict[str, Any]) -> None:
    mfu = "" if figures["mfu"] is None else f" ({figures['mfu']:.1%} MFU)"
    held_out = "".join(
        f"  {name.replace('_', ' ')} {figures[name]:.4f}" for name in HELD_OUT if name in figures
    )
    print(
        f"step {figures['step']:>6}  loss {figures['loss']:.4f}  grad norm {figures['grad_norm']:.3f}  "
        f"lr {figures['learning_rate']:.2e}  {figures['seconds_per_step']:.3f} s  "
        f"{figures['tokens_per_second']:,.0f} tokens/s  "
        f"{figures['tflops_per_rank']:.3g} TFLOP/s a rank{mfu}  "
        f"{figures['documents']} documents  balance {figures['balance']:.2f}  "
        f"data wait {figures['data_wait_ms']:.1f} ms{held_out}{_straggler(figures)}",
        flush=True,
    )


def _straggler(figures: dict[str, Any]) -> str:
    """The slowest rank, where it is much slower than most."""
    median = figures.get("forward_seconds_median", 0.0)
    slowest = figures.get("forward_seconds_slowest", 0.0)
    if slowest <= 1.25 * median:
        return ""
    return f"  rank {figures['slowest_rank']} x{slowest / max(median, 1e-9):.2f}"


class _JsonLines:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")

    def __call__(self, figures: dict[str, Any]) -> None:
        self.file.write(json.dumps(figures) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def __call__(self, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("log.wandb_project: given, but the wandb package is not installed") from error
        self.run = wandb.init(project=config.log.wandb_project)

    def __call__(self, figures: dict[str, Any]) -> None:
        self.run.log(figures, step=figures["step"])

    def close(self) -> None:
        self.run.finish()
