"""Reading long documents: what the cache answers is what a whole forward pass would, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anchor_megatron.evaluation.haystack import Haystack
from anchor_megatron.evaluation.judge import Judged, judge_sample
from anchor_megatron.evaluation.needles import TASKS, draw_sample
from anchor_megatron.evaluation.perplexity import (
    LossByPosition,
    loss_by_position,
    position_buckets,
    short_loss,
)
from anchor_megatron.evaluation.reader import Reader
from anchor_megatron.evaluation.report import Result, read_results, table, write_report
from anchor_megatron.model.builder import build_model
from anchor_megatron.testing.models import tiny_config
from anchor_megatron.testing.ranks import run_ranks
from anchor_megatron.training.setup import initialize_ranks

VOCAB = 90
CONTEXT = np.random.default_rng(0).integers(2, VOCAB, 37)  # odd: two ranks leave a token over
BRANCHES: list[tuple[list[int], list[int]]] = [([5, 6, 7], [8, 9]), ([11], [12, 13, 14, 15])]


def a_reader(world_size: int, tensor: int) -> Reader:
    """The same small model at every layout: initial weights do not depend on it."""
    config = tiny_config(parallel=dict(tensor=tensor, context=world_size // tensor), model=dict(init_std=0.2))
    initialize_ranks(config)
    gpt = build_model(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(gpt.named_parameters()):
        whole = list(parameter.shape)
        axis = getattr(parameter, "partition_dim", -1)
        if axis >= 0 and tensor > 1:
            whole[axis] *= tensor
        values = 0.2 * torch.randn(whole, generator=generator) + ("norm" in name)
        if axis >= 0 and tensor > 1:
            values = _share(values, axis, tensor, gated="fc1" in name)
        parameter.data.copy_(values)
    return Reader(gpt)


def _share(values: torch.Tensor, axis: int, tensor: int, *, gated: bool) -> torch.Tensor:
    """This tensor-parallel rank's rows; of a gated MLP, of either half."""
    rank = torch.distributed.get_rank() % tensor
    halves = values.chunk(2, dim=axis) if gated else (values,)
    return torch.cat([half.chunk(tensor, dim=axis)[rank] for half in halves], dim=axis)


def read_on_rank(rank: int, world_size: int, tensor: int) -> dict[str, Any]:
    reader = a_reader(world_size, tensor)
    reading = reader.read(CONTEXT)
    logits = [one.clone() for one in reader.answer_logits(reading, BRANCHES)]
    written = reader.generate(reading, [question for question, _ in BRANCHES], new_tokens=4)
    best = [(question, tokens) for (question, _), tokens in zip(BRANCHES, written, strict=True)]
    wrong = [(question, [*tokens[:-1], 1]) for question, tokens in best]
    tokens = np.concatenate([CONTEXT[:20], CONTEXT[:16]])
    return dict(
        logits=logits,
        written=written,
        best=[one.correct for one in reader.score(reading, best)],
        wrong=[one.correct for one in reader.score(reading, wrong)],
        losses=reader.losses(tokens, np.array([0, 20, 36])),
        by_position=loss_by_position(reader, [CONTEXT, CONTEXT[::-1].copy()], length=36, window=8, anchor=1),
        short=short_loss(reader, [CONTEXT, CONTEXT[:3]], window=8, anchor=1),
    )


def expected_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """The same by whole forward passes, one document each."""
    reader = a_reader(1, 1)

    def logits(tokens: list[int] | np.ndarray) -> torch.Tensor:
        whole = np.asarray(tokens)
        with torch.no_grad():
            hidden, index = reader._hidden(whole, np.array([0, whole.size]), None)
            assert (index == np.arange(whole.size)).all()
            return reader.gpt.logits(hidden)

    def losses(tokens: np.ndarray) -> np.ndarray:
        labels = torch.from_numpy(tokens[1:])
        return torch.nn.functional.cross_entropy(logits(tokens)[:-1], labels, reduction="none").numpy()

    written = []
    for question, _ in BRANCHES:
        tokens = [*CONTEXT, *question]
        for _ in range(4):
            tokens.append(int(logits(tokens)[-1].argmax()))
        written.append(tokens[-4:])
    chosen = [logits([*CONTEXT, *q, *a])[-len(a) - 1 : -1] for q, a in BRANCHES]
    documents = [np.concatenate([[1], one[:35]]) for one in (CONTEXT, CONTEXT[::-1])]
    sliding = []
    for tokens in documents:  # a window of 8 begins every 4 tokens, the last at 28
        starts = [0 if n < 7 else 4 * ((n - 3) // 4) for n in range(35)]
        rows = [losses(np.concatenate([[1], tokens[s + 1 : s + 8]]))[n - s] for n, s in enumerate(starts)]
        sliding.append(np.array(rows))
    return dict(
        logits=chosen,
        written=written,
        losses=np.concatenate([losses(CONTEXT[:20]), [np.nan], losses(CONTEXT[:16]), [np.nan]]),
        whole=float(np.mean([losses(one) for one in documents])),
        sliding=float(np.mean(sliding)),
        short=float(np.mean(losses(np.concatenate([[1], CONTEXT[:7]])))),
    )


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_what_the_cache_answers_is_what_whole_passes_compute(world_size: int, tensor: int) -> None:
    expected = run_ranks(1, expected_on_rank)[0]
    for got in run_ranks(world_size, read_on_rank, tensor):
        torch.testing.assert_close(got["logits"], expected["logits"], atol=2e-5, rtol=1e-4)
        assert got["written"] == expected["written"]
        assert all(all(correct) for correct in got["best"])
        assert all(correct[:-1] == (True,) * 3 for correct in got["wrong"])
        assert not any(
            correct[-1]
            for correct, tokens in zip(got["wrong"], got["written"], strict=True)
            if tokens[-1] != 1
        )
        np.testing.assert_allclose(got["losses"], expected["losses"], atol=2e-5)
        np.testing.assert_allclose(got["by_position"].whole, [expected["whole"]], atol=2e-5)
        np.testing.assert_allclose(got["by_position"].sliding, [expected["sliding"]], atol=2e-5)
        assert got["short"] == pytest.approx(expected["short"], abs=2e-5)


def test_buckets_double_and_cover_every_position() -> None:
    assert position_buckets(2047).tolist() == [0, 256, 512, 1024, 2047]
    assert position_buckets(100).tolist() == [0, 100]


def encode(texts: list[str]) -> list[list[int]]:
    """Bytes."""
    return [list(text.encode()) for text in texts]


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    folder = tmp_path_factory.mktemp("text")
    for n in range(3):
        (folder / f"{n}.txt").write_text("".join(f"line {n} {k} of the filler\n" for k in range(60)))
    return Haystack(folder, encode, suffixes=(".txt",))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [2500, 9000])
def test_a_sample_fills_its_length_and_holds_its_answers(task: str, tokens: int, haystack: Haystack) -> None:
    sample = draw_sample(task, tokens=tokens, haystack=haystack, seed=1, number=2)
    assert sample == draw_sample(task, tokens=tokens, haystack=haystack, seed=1, number=2)
    assert sample.context != draw_sample(task, tokens=tokens, haystack=haystack, seed=1, number=3).context
    text = bytes(sample.context).decode()
    longest = max(len(question.prompt + question.answer) for question in sample.questions)
    used = 1 + len(text) + longest
    # byte tokens never merge: the two tokens of slack stay free; word lists end with a word
    assert used == tokens - 2 if task not in ("common", "frequent") else tokens * 0.9 < used <= tokens
    for question in sample.questions:
        assert all(word in text and word in question.answer for word in question.expected)
        assert 0 <= question.depth <= 1
        if task in ("single", "multi_key"):
            place = text.index(question.expected[0]) / len(text)
            assert place == pytest.approx(question.depth, abs=0.06)


def test_the_word_lists_answer_is_what_counting_finds(haystack: Haystack) -> None:
    for task in ("common", "frequent"):
        sample = draw_sample(task, tokens=9000, haystack=haystack, seed=1, number=0)
        words, counts = np.unique(bytes(sample.context).decode().split(), return_counts=True)
        largest = {str(word) for word in words[np.argsort(-counts)[:3]]}
        assert largest == set(sample.questions[0].expected)


def test_variables_are_followed_to_the_value(haystack: Haystack) -> None:
    sample = draw_sample("tracking", tokens=4000, haystack=haystack, seed=5, number=0)
    values: dict[str, str] = {}
    for line in bytes(sample.context).decode().splitlines():
        if line.startswith("VAR "):
            name, value = line.removeprefix("VAR ").split(" = ")
            values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR ") else value
    question = sample.questions[0]
    asked = question.prompt.split("value ")[1].split(" ")[0]
    assert {name for name, value in values.items() if value == asked} == set(question.expected)


def test_what_cannot_be_drawn_is_refused(haystack: Haystack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task: got 'needle', expected one of single, "):
        draw_sample("needle", tokens=500, haystack=haystack, seed=1, number=0)
    with pytest.raises(ValueError, match="multi_key: got a length of 300 tokens, expected at least"):
        draw_sample("multi_key", tokens=300, haystack=haystack, seed=1, number=0)
    with pytest.raises(ValueError, match="got no text"):
        Haystack(tmp_path, encode)


class ModelThatKnows:
    """Answers every question as the sample would have it, but the second wrongly."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def read(self, tokens: list[int]) -> None:
        assert tokens[0] == 0

    def score(self, reading: None, branches: list[Any]) -> list[Any]:
        from anchor_megatron.evaluation.reader import Scored

        return [
            Scored(-float(len(answer)), (True,) * (len(answer) - 1) + (n != 1,))
            for n, (_, answer) in enumerate(branches)
        ]

    def generate(self, reading: None, questions: list[Any], *, new_tokens: int) -> list[list[int]]:
        return [
            list(text.encode()) for text in ["nothing" if n == 1 else a for n, a in enumerate(self.answers)]
        ]


def test_answers_are_scored_by_choice_and_by_what_is_written(haystack: Haystack) -> None:
    sample = draw_sample("multi_key", tokens=2500, haystack=haystack, seed=1, number=0)
    reader: Any = ModelThatKnows([question.answer for question in sample.questions])
    judged = judge_sample(
        reader, sample, haystack=haystack, length=2500, anchor=0, decode=lambda tokens: bytes(tokens).decode()
    )
    assert [one.exact for one in judged] == [one.greedy for one in judged] == [1, 0, 1, 1, 1, 1, 1, 1]
    assert judged[1].token_accuracy == pytest.approx(7 / 8) and judged[0].log_probability == -1


def test_reports_put_checkpoints_side_by_side(tmp_path: Path) -> None:
    def result(name: str, exact: float) -> Result:
        needle = Judged("single", 4096, 0.5, exact, exact, -1.0, None, None)
        losses = LossByPosition((0, 256), (256, 1000), (3.0, 2.5), (3.0, 2.75))
        return Result(name, [needle], {"short_loss": 3.25}, losses)

    results = [result("base-7", 0.0), result("anchor-1", 0.5), result("anchor-2", 1.0)]
    lines = table(results).splitlines()
    assert lines[0].split("  ")[0] == "checkpoint" and "single 4K" in lines[0]
    assert lines[1].split()[:2] == ["base-7", "0.000"]
    assert lines[2].split()[:4] == ["anchor", "0.750", "±", "0.250"]
    write_report(tmp_path, results)
    assert read_results(tmp_path / "results.json") == results
    page = (tmp_path / "results.html").read_text()
    assert "<td>0.750 ± 0.250</td>" in page
    for picture in ("needles.png", "loss_by_position.png"):
        assert picture in page and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
