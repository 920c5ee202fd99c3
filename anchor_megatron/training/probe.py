"""Looks for leaks before a run: `pretrain_anchor.py CONFIG --check`, on the real model, data and ranks.

    ok      positions   4,096 tokens, each on one rank, at the positions of mode anchor
    ok      leaks       6 changes of 8 documents: no row moved that cannot see a change
    ok      CP 4        equals CP 1 on 2,048 tokens (largest difference of a row 0.0031, at most 0.05)
    check passed

Rows are the model's last hidden states, before the output layer. A change gives some of the documents other
tokens from their middle on: in turn those whose number has a 0, then a 1, at each place of its binary form,
so that of any two documents each is changed once while the other is not. Rows that see a change by the mode's
rule have to move (else the probe would see nothing); all others, a changed document's earlier ones among
them, may not move by a bit, so neither can their loss.

Legend: T rows of this rank, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from anchor_megatron.config import Config
from anchor_megatron.data.window import Window
from anchor_megatron.model.builder import rank_device
from anchor_megatron.training.batch import PlannedBatch, plan_batch
from anchor_megatron.training.loader import cost_model
from anchor_megatron.training.step import Trainee, forward_step

__all__ = ["Check", "check_run"]

_SLICE = 1024  # tokens a context-parallel rank holds in the comparison with CP 1
_EXPERTS_TOLERANCE = 2.0**-6  # of the largest value: expert products depend on how many tokens an expert got
_CP_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # of a row's norm: products of other shapes round otherwise


@dataclass(frozen=True)
class Check:
    """One question, its answer in words, and whether it passed."""

    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED':<8}{self.name:<12}{self.text}"


def check_run(config: Config, trainee: Trainee, windows: Sequence[Window]) -> list[Check]:
    """All checks on the `windows` of one micro-batch. All ranks call it together and get the same answers."""
    probe = _Probe(config, trainee)
    checks = [_check_positions(probe, windows), _check_leaks(probe, windows)]
    if config.parallel.context > 1:
        checks.append(_check_context_parallel(probe, windows[0]))
    return checks


class _Probe:
    """Forward passes of the run's own model."""

    def __init__(self, config: Config, trainee: Trainee) -> None:
        self.config, self.trainee = config, trainee

    def plan(self, windows: Sequence[Window], *, alone: bool = False) -> PlannedBatch:
        """This rank's share of `windows`; `alone`: all of them, as with one context-parallel rank."""
        return plan_batch(
            windows,
            mode=self.config.data.mode,
            placement=self.config.attention.placement,
            exchange=self.config.attention.exchange,
            ring_rows=self.config.attention.ring_rows,
            costs=cost_model(self.config),
            context_parallel_size=1 if alone else self.config.parallel.context,
            context_parallel_rank=0 if alone else parallel_state.get_context_parallel_rank(),
        )

    @torch.no_grad()
    def forward(self, planned: PlannedBatch) -> Tensor | None:
        """Last hidden states [T, D] of this rank's rows; None but on the last pipeline stage."""
        kept: list[Tensor] = []
        hook = self.trainee.gpt.decoder.register_forward_hook(lambda module, inputs, out: kept.append(out))
        rows = planned.plan.token_index.size * self.config.parallel.context  # the schedule divides again
        try:
            get_forward_backward_func()(
                forward_step_func=partial(forward_step, []),
                data_iterator=iter([planned]),
                model=[self.trainee.model],
                num_microbatches=1,
                seq_length=rows,
                micro_batch_size=1,
                decoder_seq_length=rows,
                forward_only=True,
            )
        finally:
            hook.remove()
        if not parallel_state.is_pipeline_last_stage():
            return None
        hidden = kept[0]
        if self.config.parallel.sequence:
            hidden = gather_from_sequence_parallel_region(hidden)
        return hidden[:, 0]


def _check_positions(probe: _Probe, windows: Sequence[Window]) -> Check:
    """Tokens and positions of the batch against the mode's rule, written out a document at a time."""
    mode = probe.config.data.mode
    expected: list[int] = []
    for window in windows:
        own = 0  # tokens of the window before this document, anchors not counted
        for begin, end in zip(window.cu_seqlens[:-1].tolist(), window.cu_seqlens[1:].tolist(), strict=True):
            expected += {
                "full": range(begin, end),
                "document": range(begin, end),
                "document_reset": range(end - begin),
                "anchor": [0, *range(own + 1, own + end - begin)],
            }[mode]
            own += end - begin - 1
    planned = probe.plan(windows)
    index = planned.plan.token_index
    batch = planned.to(rank_device())
    tokens = np.concatenate([window.tokens for window in windows])
    mine = dict(
        index=index,
        positions=bool(np.array_equal(batch.positions[0].cpu().numpy(), np.array(expected)[index])),
        tokens=bool(np.array_equal(batch.tokens[0].cpu().numpy(), tokens[index])),
    )
    found = _gather(mine, group=parallel_state.get_context_parallel_group())
    owned = np.sort(np.concatenate([one["index"] for one in found]))
    wrong = [name for name in ("positions", "tokens") if not all(one[name] for one in found)]
    if not np.array_equal(owned, np.arange(tokens.size)):
        wrong.append("ownership (a token is not on exactly one rank)")
    everywhere = sorted({name for names in _gather(wrong) for name in names})
    if everywhere:
        return Check("positions", False, f"wrong for mode {mode}: {', '.join(everywhere)}")
    return Check(
        "positions", True, f"{tokens.size:,} tokens, each on one rank, at the positions of mode {mode}"
    )


def _check_leaks(probe: _Probe, windows: Sequence[Window]) -> Check:
    """Changes documents and looks at whose rows move; see the file's opening."""
    cu_seqlens, size = _borders(windows), windows[0].tokens.size
    tokens = np.concatenate([window.tokens for window in windows])
    planned = probe.plan(windows)
    index, rows = planned.plan.token_index, probe.forward(planned)
    changes = _changes(probe.config.data.mode, cu_seqlens, size)
    leaks: set[int] = set()
    still = 0
    for changed, sees in changes:
        other = np.where(changed, (tokens + 1) % (probe.config.model.vocab_size or 1), tokens)
        edited = [
            replace(one, tokens=part)
            for one, part in zip(windows, np.split(other, len(windows)), strict=True)
        ]
        new_rows = probe.forward(probe.plan(edited))
        if rows is None or new_rows is None:
            continue
        bound = float(rows.abs().max()) * _EXPERTS_TOLERANCE if probe.config.model.num_experts else 0.0
        moved = (new_rows.float() - rows.float()).abs().amax(dim=-1).cpu().numpy()
        leaked = index[~(moved <= bound) & ~sees[index]]
        leaks |= set((np.searchsorted(cu_seqlens, leaked, side="right") - 1).tolist())
        still += int((moved[changed[index]] == 0).sum())
    everywhere = _gather((leaks, still))
    leaks = set().union(*(found for found, _ in everywhere))
    still = sum(count for _, count in everywhere)
    what = f"{len(changes)} changes of {cu_seqlens.size - 1} documents"
    if leaks:
        return Check(
            "leaks", False, f"{what}: rows moved that cannot see a change, in documents {_few(leaks)}"
        )
    if still:
        return Check("leaks", False, f"{what}: {still} of the changed rows did not move")
    return Check("leaks", True, f"{what}: no row moved that cannot see a change")


def _changes(mode: str, cu_seqlens: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of bool [tokens]: what a change alters, and what sees it by the rule of `mode`."""
    documents = np.arange(cu_seqlens.size - 1)
    if mode == "full" or documents.size == 1:
        chosen = [documents >= documents.size // 2]  # whatever comes before must not move
    else:
        bits = range(int(documents[-1]).bit_length())
        chosen = [(documents >> bit & 1) == value for bit in bits for value in (0, 1)]
    found = []
    for which in chosen:
        changed, sees = (np.zeros(cu_seqlens[-1], dtype=bool) for _ in range(2))
        for begin, end in zip(cu_seqlens[:-1][which].tolist(), cu_seqlens[1:][which].tolist(), strict=True):
            first = begin + max(1, (end - begin) // 2)  # an anchor stays an anchor
            changed[first:end] = True
            sees[first : (first // size + 1) * size if mode == "full" else end] = True
        found.append((changed, sees))
    return found


def _check_context_parallel(probe: _Probe, window: Window) -> Check:
    """The beginning of a window, on all context-parallel ranks and on one."""
    parallel = probe.config.parallel
    unit = 2 * parallel.context * parallel.tensor
    length = min(window.tokens.size, _SLICE * parallel.context) // unit * unit
    name = f"CP {parallel.context}"
    if not length:
        return Check(
            name, False, f"got windows of {window.tokens.size} tokens, expected {unit} to compare with CP 1"
        )
    short = [_front(window, length)]
    spread, whole = probe.plan(short), probe.plan(short, alone=True)
    rows, all_rows = probe.forward(spread), probe.forward(whole)
    worst = 0.0
    if rows is not None and all_rows is not None:
        expected = all_rows[torch.from_numpy(spread.plan.token_index).to(all_rows.device)].float()
        worst = float(((rows.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    worst = float(np.max(_gather(worst)))  # np.max, unlike max(), hands on NaN
    bound = _CP_TOLERANCE[probe.config.train.precision]
    says = f"CP 1 on {length:,} tokens (largest difference of a row {worst:.2g}, at most {bound:g})"
    return Check(name, worst <= bound, f"{'equals' if worst <= bound else 'differs from'} {says}")


def _borders(windows: Sequence[Window]) -> np.ndarray:
    """Document borders of windows laid one after another."""
    size = windows[0].tokens.size
    starts = [window.cu_seqlens[:-1] + size * n for n, window in enumerate(windows)]
    return np.concatenate([*starts, [size * len(windows)]])


def _front(window: Window, length: int) -> Window:
    """The first `length` tokens; labels behind the cut are still the window's own."""
    documents = int(np.searchsorted(window.cu_seqlens, length))
    return Window(
        tokens=window.tokens[:length],
        labels=window.labels[:length],
        loss_mask=window.loss_mask[:length],
        cu_seqlens=np.append(window.cu_seqlens[:documents], length),
        document_ids=window.document_ids[:documents],
        document_offsets=window.document_offsets[:documents],
    )


def _gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank (of `group`), in rank order."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _few(documents: set[int]) -> str:
    shown = ", ".join(str(document) for document in sorted(documents)[:5])
    return shown if len(documents) <= 5 else f"{shown} and {len(documents) - 5} more"
