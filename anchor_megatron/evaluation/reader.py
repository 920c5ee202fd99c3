"""A model that reads one long document with all its context-parallel ranks, then answers from what it keeps.

    context   anchor t1 t2 ... tS           read once, by the plan; keys and values stay where they are
    question  "... for kelp is:"            a branch behind the context; many questions share one reading
    answer    " 7421093"                    scored as it stands (teacher forcing), or generated greedily

A context need not be a multiple of the ranks: what is left over (fewer tokens than ranks) goes first in every
branch. Logits are computed for the rows that are asked about alone.

Legend: T rows of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from anchor_megatron.data.window import Window
from anchor_megatron.model.builder import rank_device
from anchor_megatron.model.cache import KeyValueCache
from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.model.gpt import AnchorGPT
from anchor_megatron.training.batch import plan_batch

__all__ = ["Reading", "Reader", "Scored"]


@dataclass
class Reading:
    """A context that has been read: its keys and values, and the tokens that no rank's share had room for."""

    cache: KeyValueCache
    left_over: list[int]
    tokens: int  # in the cache


@dataclass(frozen=True)
class Scored:
    """A teacher-forced answer: its tokens' summed log-probability, and which the model would have chosen."""

    log_probability: float
    correct: tuple[bool, ...]


class Reader:
    """Reads with `gpt`, on all ranks of its context- and tensor-parallel groups together."""

    def __init__(self, gpt: AnchorGPT) -> None:
        self.gpt = gpt.eval()
        self.group = parallel_state.get_context_parallel_group()

    @torch.no_grad()
    def read(self, tokens: Sequence[int] | np.ndarray) -> Reading:
        """Reads a document, anchor first. ValueError where it has fewer tokens than there are ranks."""
        whole = np.asarray(tokens, dtype=np.int64)
        held = whole.size - whole.size % self.group.size()
        if not held:
            raise ValueError(f"context: got {whole.size} tokens, expected at least {self.group.size()}")
        cache = KeyValueCache(self.group)
        self._hidden(whole[:held], np.array([0, held]), cache)
        return Reading(cache, whole[held:].tolist(), held)

    @torch.no_grad()
    def score(
        self, reading: Reading, branches: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Scored]:
        """Every (question, answer) scored as if the answer had been written: one forward pass for all."""
        found = []
        for (_, answer), logits in zip(branches, self.answer_logits(reading, branches), strict=True):
            wanted = torch.tensor(list(answer), device=logits.device)
            chosen = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).sum()
            found.append(Scored(chosen.item(), tuple((logits.argmax(dim=-1) == wanted).tolist())))
        return found

    @torch.no_grad()
    def answer_logits(
        self, reading: Reading, branches: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Tensor]:
        """For every (question, answer) the logits that foretell the answer, fp32 [its tokens, vocabulary]."""
        rows = [[*reading.left_over, *question, *answer] for question, answer in branches]
        reading.cache.forget_branches()
        hidden = self._go_on(reading, [(n, row[:-1], 0) for n, row in enumerate(rows)])
        found, begin = [], 0
        for (_, answer), row in zip(branches, rows, strict=True):
            end = begin + len(row) - 1
            found.append(self.gpt.logits(hidden[end - len(answer) : end]).float())
            begin = end
        return found

    @torch.no_grad()
    def generate(
        self, reading: Reading, questions: Sequence[Sequence[int]], *, new_tokens: int
    ) -> list[list[int]]:
        """The `new_tokens` that follow every question, each the most probable one."""
        reading.cache.forget_branches()
        rows = [[*reading.left_over, *question] for question in questions]
        hidden = self._go_on(reading, [(n, row, 0) for n, row in enumerate(rows)])
        last = hidden[torch.tensor([len(row) for row in rows], device=hidden.device).cumsum(0) - 1]
        answers: list[list[int]] = [[] for _ in rows]
        for step in range(new_tokens):
            chosen = self.gpt.logits(last).argmax(dim=-1).tolist()
            for answer, token in zip(answers, chosen, strict=True):
                answer.append(token)
            if step + 1 < new_tokens:
                branches = [(n, [token], len(rows[n]) + step) for n, token in enumerate(chosen)]
                last = self._go_on(reading, branches)
        return answers

    @torch.no_grad()
    def last_hidden(self, tokens: np.ndarray) -> Tensor:
        """The hidden state [D], fp32, of a document's last token, read with nothing kept. On every rank."""
        hidden, index = self._hidden(tokens, np.array([0, tokens.size]), None)
        rows = torch.from_numpy(np.flatnonzero(index == tokens.size - 1)).to(hidden.device)
        found = hidden[rows].float().sum(dim=0)  # zeros on the ranks that do not hold it
        dist.all_reduce(found, group=self.group)
        return found

    @torch.no_grad()
    def continued(self, reading: Reading, tokens: list[int]) -> Tensor:
        """The hidden state [D], fp32, of the last of `tokens` behind a context."""
        reading.cache.forget_branches()
        return self._go_on(reading, [(0, [*reading.left_over, *tokens], 0)])[-1].float()

    @torch.no_grad()
    def losses(self, tokens: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        """Cross entropy fp32 [S] of every token's successor in the documents with borders `cu_seqlens`, NaN
        for each document's last. Positions restart in each; S must be a multiple of the ranks. On every rank.
        """
        hidden, index = self._hidden(tokens, cu_seqlens, None)
        labels = torch.from_numpy(np.append(tokens[1:], 0)[index]).to(hidden.device)
        own = self.gpt.token_losses(hidden, labels)
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        order = [torch.empty(index.size, dtype=torch.int64, device=own.device) for _ in parts]
        dist.all_gather(parts, own, group=self.group)  # no gradient passes: no adjoint, here and below
        dist.all_gather(order, torch.from_numpy(index).to(own.device), group=self.group)
        found = torch.empty(tokens.size, dtype=torch.float32, device=own.device)
        found[torch.cat(order)] = torch.cat(parts)
        losses = found.cpu().numpy()
        losses[cu_seqlens[1:] - 1] = np.nan
        return losses

    def _hidden(
        self, tokens: np.ndarray, cu_seqlens: np.ndarray, cache: KeyValueCache | None
    ) -> tuple[Tensor, np.ndarray]:
        """Hidden states [T, D] of this rank's rows, and which tokens they are."""
        planned = plan_batch(
            [_window(tokens, cu_seqlens)],
            mode="document_reset",  # of a single document every mode makes the same
            placement="document",
            context_parallel_size=self.group.size(),
            context_parallel_rank=self.group.rank(),
        )
        batch = planned.to(rank_device())
        given = PlannedSeqParams(plan=batch.plan, cache=cache)
        return self.gpt.hidden_states(batch.tokens, batch.positions, given), planned.plan.token_index

    def _go_on(self, reading: Reading, branches: Sequence[tuple[int, list[int], int]]) -> Tensor:
        """Hidden states of new tokens: (branch, tokens, how many the branch already has)."""
        device = rank_device()
        lengths = torch.tensor([len(row) for _, row, _ in branches])
        names = torch.tensor([branch for branch, _, _ in branches]).repeat_interleave(lengths)
        places = [reading.tokens + before + n for _, row, before in branches for n in range(len(row))]
        tokens = torch.tensor([token for _, row, _ in branches for token in row], device=device)
        reading.cache.new_rows(names.to(device))
        given = PlannedSeqParams(cache=reading.cache)
        return self.gpt.hidden_states(tokens[None], torch.tensor([places], device=device), given)


def _window(tokens: np.ndarray, cu_seqlens: np.ndarray) -> Window:
    """Documents for reading; nothing is trained on."""
    documents = np.arange(cu_seqlens.size - 1)
    return Window(
        tokens.astype(np.int64),
        np.zeros(tokens.size, dtype=np.int64),
        np.zeros(tokens.size, dtype=bool),
        cu_seqlens.astype(np.int64),
        documents,
        np.zeros_like(documents),
    )
