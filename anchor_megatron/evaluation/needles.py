"""Questions about long contexts, in the manner of RULER (arXiv 2404.06654), over any text and any tokenizer.

    single      ... The special number for amber-kestrel is: 4817263. ...       one needle, one question
    multi_key   eight such needles, a question about each: the others distract
    multi_value one key with four numbers, asked for together
    multi_query four keys, asked for together
    tracking    VAR QXA = 51823 ... VAR PLM = VAR QXA ...                        which names hold 51823?
    common      a list of words, three of them often, the rest seldom           which are the most common?
    common      a list of words, three often and the rest seldom                   which are the most common?
    distractors facts about several people, some of one family                   what is Ada Marlowe's locker?

The tasks are RULER's; texts and code are our own, so figures are comparable among models judged here, not
with published ones. A sample is drawn from (task, length, seed, number) alone. Its context, with an anchor
before it and the longest question and answer behind it, fills the length to two tokens, but for the two word
lists, which end with a whole word.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anchor_megatron.evaluation.haystack import Encode, Haystack

__all__ = ["TASKS", "Question", "Sample", "draw_sample"]


@dataclass(frozen=True)
class Question:
    """What follows the context. `expected` must all be in the answer; `answer` is how it is written out."""

    prompt: str
    answer: str
    expected: tuple[str, ...]
    depth: float
    """Where its first needle stands, from 0 (front) to 1."""


@dataclass(frozen=True)
class Sample:
    """A context of token ids, without an anchor, and questions about it."""

    task: str
    context: list[int]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Draft:
    """Needles with the depth each goes to, and the questions. `filler` stands for the haystack if given."""

    needles: list[tuple[float, str]]
    questions: tuple[Question, ...]
    filler: Callable[[int], list[list[int]]] | None = None


def draw_sample(
    task: str,
    *,
    tokens: int,
    haystack: Haystack,
    seed: int,
    number: int,
    depth: float | None = None,
) -> Sample:
    """Sample `number` of a task, with an anchor and its longest question and answer `tokens` long.

    depth: where a single needle stands; drawn where None. ValueError for an unknown task, or where the
    needles do not fit.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    generator = np.random.default_rng([seed, zlib.crc32(task.encode()), tokens, number])
    draft = TASKS[task](generator, haystack.encode, depth)
    asked = haystack.encode([question.prompt + question.answer for question in draft.questions])
    # a question and its answer are tokenised apart, which may take a token more
    room = tokens - 1 - max(map(len, asked)) - 2
    needles = haystack.encode([text for _, text in draft.needles])
    room_for_filler = room - sum(map(len, needles))
    if room_for_filler < 0:
        raise ValueError(
            f"{task}: got a length of {tokens} tokens, expected at least {tokens - room_for_filler}"
        )
    if draft.filler is not None:
        return Sample(task, _joined(draft.filler(room)), draft.questions)
    lines = haystack.fill(room_for_filler, generator)
    depths = [depth for depth, _ in draft.needles]
    return Sample(task, _joined(_with_needles(lines, needles, depths)), draft.questions)


def _joined(lines: list[list[int]]) -> list[int]:
    return [token for line in lines for token in line]


def _with_needles(lines: list[list[int]], needles: list[list[int]], depths: list[float]) -> list[list[int]]:
    """Each needle between two lines, as near its depth as a line's end comes."""
    ends = np.cumsum([0, *map(len, lines)])
    places = np.searchsorted(ends, np.array(depths) * ends[-1])
    found, at = [], 0
    for n in np.argsort(places, kind="stable"):
        found += lines[at : places[n]]
        found.append(needles[n])
        at = max(at, int(places[n]))
    return found + lines[at:]


_FIRST = (
    "amber brisk calm dusky eager faint gentle hollow ivory jolly keen lunar mellow noble opal plain".split()
)
_SECOND = (
    "kestrel lantern meadow nettle orchard pebble quarry raven saddle thicket urchin valley walnut".split()
)


def _keys(generator: np.random.Generator, count: int) -> list[str]:
    pairs = generator.choice(len(_FIRST) * len(_SECOND), count, replace=False)
    return [f"{_FIRST[n // len(_SECOND)]}-{_SECOND[n % len(_SECOND)]}" for n in pairs]


def _numbers(generator: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    return [str(n) for n in generator.integers(10 ** (digits - 1), 10**digits, count)]


def _fact(key: str, number: str) -> str:
    return f"The special number for {key} is: {number}.\n"


def _depths(generator: np.random.Generator, count: int) -> list[float]:
    """One drawn from each of `count` equal parts of the context, in order."""
    return [float(n) for n in (np.arange(count) + generator.random(count)) / count]


def _listed(words: list[str]) -> str:
    return " " + ", ".join(words)


def _single(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    key, number = _keys(generator, 1)[0], _numbers(generator, 1)[0]
    at = float(generator.random()) if depth is None else depth
    question = Question(f"\nThe special number for {key} is:", f" {number}", (number,), at)
    return _Draft([(at, _fact(key, number))], (question,))


def _multi_key(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    keys, numbers, depths = _keys(generator, 8), _numbers(generator, 8), _depths(generator, 8)
    questions = tuple(
        Question(f"\nThe special number for {key} is:", f" {number}", (number,), at)
        for key, number, at in zip(keys, numbers, depths, strict=True)
    )
    facts = [_fact(key, number) for key, number in zip(keys, numbers, strict=True)]
    return _Draft(list(zip(depths, facts, strict=True)), questions)


def _multi_value(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    key, numbers, depths = _keys(generator, 1)[0], _numbers(generator, 4), _depths(generator, 4)
    prompt = f"\nAll four special numbers for {key} are:"
    question = Question(prompt, _listed(numbers), tuple(numbers), depths[0])
    return _Draft([(at, _fact(key, n)) for at, n in zip(depths, numbers, strict=True)], (question,))


def _multi_query(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    keys, numbers, depths = _keys(generator, 4), _numbers(generator, 4), _depths(generator, 4)
    prompt = f"\nThe special numbers for {', '.join(keys)} are:"
    facts = [_fact(key, number) for key, number in zip(keys, numbers, strict=True)]
    question = Question(prompt, _listed(numbers), tuple(numbers), depths[0])
    return _Draft(list(zip(depths, facts, strict=True)), (question,))


def _tracking(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    """Two chains of five names, one asked about; the names of each come in order through the context."""
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names = ["".join(generator.choice(letters, 5, replace=False)) for _ in range(10)]
    values = _numbers(generator, 2, digits=5)
    needles = []
    for chain, value in zip((names[:5], names[5:]), values, strict=True):
        for before, name, at in zip([None, *chain], chain, _depths(generator, 5), strict=False):
            needles.append((at, f"VAR {name} = {value if before is None else f'VAR {before}'}\n"))
    prompt = f"\nThe names of all variables that hold the value {values[0]} are:"
    return _Draft(needles, (Question(prompt, _listed(names[:5]), tuple(names[:5]), needles[0][0]),))


def _common(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    def repeats(words: list[str], count: int) -> list[str]:
        rest = words[3:]
        often, seldom = (30, 3) if count > 200 else (10, 1)
        distinct = min(max(0, count - 3 * often) // seldom, len(rest))
        drawn = words[:3] * often + rest[:distinct] * seldom
        return [str(word) for word in generator.permutation(drawn)]

    return _word_list(generator, encode, repeats, "The three most common words in the list are:")


def _frequent(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    def power_law(words: list[str], count: int) -> list[str]:
        weights = np.arange(1, min(len(words), 500) + 1) ** -2.0
        counts = np.maximum((weights / weights.sum() * count).astype(int), 0)
        drawn = [word for word, n in zip(words, counts, strict=False) for _ in range(n)]
        return [str(word) for word in generator.permutation(drawn)]

    return _word_list(generator, encode, power_law, "The three most frequent coded words above are:")


def _word_list(
    generator: np.random.Generator,
    encode: Encode,
    arrange: Callable[[list[str], int], list[str]],
    asked: str,
) -> _Draft:
    """A context of coded words alone; the first three of the words are the answer."""
    syllables = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])
    drawn = generator.choice(syllables.size**3, 20_000, replace=False)
    parts = syllables[np.stack(np.unravel_index(drawn, (syllables.size,) * 3))]
    words = ["".join(word) for word in parts.T]

    def filler(room: int) -> list[list[int]]:
        sizes = encode([f" {word}" for word in words[:300]])
        count = int(room / np.mean([len(size) for size in sizes]) * 0.97)
        lines = encode([f" {word}" for word in arrange(words, max(count, 40))])
        ends = np.cumsum([len(line) for line in lines])
        return lines[: int(np.searchsorted(ends, room, side="right"))]

    question = Question(f"\n{asked}", _listed(words[:3]), tuple(words[:3]), 0.0)
    return _Draft([], (question,), filler)


_NAMES = "Ada Bruno Clara Dorian Elsa Felix Greta Hugo Ines Jonas Karla Leon".split()
_FAMILIES = (
    "Marlowe Norwood Ostler Pemberton Quill Rusk Sorrel Tamsin Underhill Varga Wexford Yardley".split()
)
_KINDS = ("locker", "parking space", "telephone", "library card")


def _distractors(generator: np.random.Generator, encode: Encode, depth: float | None) -> _Draft:
    """Eight people, some of one family, four numbers each; a question about every third."""
    families = [_FAMILIES[n] for n in generator.integers(0, 4, 8)]
    people = sorted({f"{name} {family}" for name, family in zip(_NAMES, families, strict=False)})
    people = [str(person) for person in generator.permutation(people)]
    needles, questions = [], []
    for n, (person, at) in enumerate(zip(people, _depths(generator, len(people)), strict=True)):
        numbers = _numbers(generator, len(_KINDS), digits=5)
        facts = [f"{person}'s {kind} is number {value}." for kind, value in zip(_KINDS, numbers, strict=True)]
        needles.append((at, " ".join(facts) + "\n"))
        if n % 3 == 0:
            k = int(generator.integers(len(_KINDS)))
            thing = f"{person}'s {_KINDS[k]}"
            prompt = f"\nQuestion: what is the number of {thing}? Answer: {thing} is number"
            questions.append(Question(prompt, f" {numbers[k]}", (numbers[k],), at))
    return _Draft(needles, tuple(questions))


TASKS: dict[str, Callable[[np.random.Generator, Encode, float | None], _Draft]] = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "tracking": _tracking,
    "common": _common,
    "frequent": _frequent,
    "distractors": _distractors,
}
