"""A model's answers to samples, scored in two ways.

    teacher-forced   the answer's tokens are given: how many of them would the model have chosen, and all?
    greedy           the model writes on; which of the expected strings are in what it wrote? (RULER's score)

Greedy decoding writes an answer exactly if every teacher-forced choice is right. So for a question with one
expected string "all right" is exact match under greedy decoding, at the price of one forward pass. With
several expected strings, in any order, only greedy decoding tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from anchor_megatron.evaluation.haystack import Haystack
from anchor_megatron.evaluation.needles import Sample, draw_sample
from anchor_megatron.evaluation.reader import Reader

__all__ = ["Judged", "judge_needles", "judge_sample"]


@dataclass(frozen=True)
class Judged:
    """One question's scores, each in [0, 1]; `greedy` and `wrote` are None where nothing was generated."""

    task: str
    length: int
    depth: float
    token_accuracy: float
    """Share of the answer's tokens that are the most probable ones, the earlier ones given."""
    exact: float
    """Whether all of them are."""
    log_probability: float
    """Of the answer, nats a token."""
    greedy: float | None
    """Share of the expected strings in what the model wrote."""
    wrote: str | None


def judge_needles(
    reader: Reader,
    haystack: Haystack,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    depths: int,
    anchor: int,
    seed: int,
    decode: Callable[[list[int]], str] | None,
) -> list[Judged]:
    """`samples` samples of every task and length. The single needle goes through `depths` equal steps of
    depth instead, `samples` times. decode: from tokens to text, for greedy decoding; None leaves that out.
    """
    found = []
    for length in lengths:
        for task in tasks:
            places: list[float | None] = [None]
            if task == "single":
                places = [float(x) for x in np.linspace(0, 1, depths)]
            for number in range(samples * len(places)):
                sample = draw_sample(
                    task,
                    tokens=length,
                    haystack=haystack,
                    seed=seed,
                    number=number,
                    depth=places[number % len(places)],
                )
                found += judge_sample(
                    reader, sample, haystack=haystack, length=length, anchor=anchor, decode=decode
                )
    return found


def judge_sample(
    reader: Reader,
    sample: Sample,
    *,
    haystack: Haystack,
    length: int,
    anchor: int,
    decode: Callable[[list[int]], str] | None,
) -> list[Judged]:
    """Every question of one sample, its context read once."""
    prompts = haystack.encode([question.prompt for question in sample.questions])
    answers = haystack.encode([question.answer for question in sample.questions])
    reading = reader.read([anchor, *sample.context])
    scored = reader.score(reading, list(zip(prompts, answers, strict=True)))
    wrote: list[str | None] = [None] * len(prompts)
    if decode is not None:
        most = max(map(len, answers)) + 2  # another spelling of the answer may take a token more
        wrote = [decode(tokens) for tokens in reader.generate(reading, prompts, new_tokens=most)]
    found = []
    for question, one, text in zip(sample.questions, scored, wrote, strict=True):
        greedy = None if text is None else float(np.mean([word in text for word in question.expected]))
        found.append(
            Judged(
                task=sample.task,
                length=length,
                depth=question.depth,
                token_accuracy=float(np.mean(one.correct)),
                exact=float(all(one.correct)),
                log_probability=one.log_probability / len(one.correct),
                greedy=greedy,
                wrote=text,
            )
        )
    return found
