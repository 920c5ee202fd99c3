"""Long documents from folders of sources and manuals, and short exercises in looking things up.

    python examples/extend_small/collect.py packages/* --held-out packages/git-doc --output build/extend_small

Every folder is one body of text (an unpacked package): its files, in path order, are joined into documents
of 2,000 to 400,000 characters, lengths drawn evenly on a logarithmic scale. The exercises are samples of the
evaluation's own tasks of at most 4,500 characters, with their answers: a small model would else not learn to
answer at all. Writes train.jsonl, and a file a document of the held-out folders in held_out/.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anchor_megatron.evaluation.haystack import Haystack
from anchor_megatron.evaluation.needles import TASKS, draw_sample

SUFFIXES = (".py", ".rst", ".txt", ".md", ".go", ".pod", ".pm", ".pl", ".adoc", ".el", ".tcc", ".hpp", ".h")
SHORTEST, LONGEST = 2_000, 400_000  # characters of a document
EXERCISE = (1_800, 4_500)  # characters of an exercise


def main() -> None:
    """Writes the two sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--held-out", nargs="+", type=Path, required=True, help="folders for evaluation alone"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--most", type=float, default=8.0, help="million characters of a folder (%(default)s)"
    )
    parser.add_argument("--exercises", type=float, default=0.2, help="their share (%(default)s)")
    given = parser.parse_args()
    generator = np.random.default_rng(0)
    held_out = {folder.resolve() for folder in given.held_out}
    given.output.mkdir(parents=True, exist_ok=True)
    written = 0
    with (given.output / "train.jsonl").open("w") as file:
        for folder in given.folders:
            if folder.resolve() not in held_out:
                for text in joined(folder, generator, int(given.most * 1e6)):
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text)
        seen = next(folder for folder in given.folders if folder.resolve() not in held_out)
        for text in exercises(seen, generator, int(written * given.exercises)):
            file.write(json.dumps({"text": text}) + "\n")
    shutil.rmtree(given.output / "held_out", ignore_errors=True)
    (given.output / "held_out").mkdir()
    for folder in given.held_out:
        for n, text in enumerate(joined(folder, generator, int(given.most * 1e6))):
            (given.output / "held_out" / f"{folder.name}-{n:03}.txt").write_text(text)
    print(f"{written / 1e6:.1f} million characters")


def joined(folder: Path, generator: np.random.Generator, most: int) -> Iterator[str]:
    """The folder's files as documents, `most` characters altogether."""
    parts: list[str] = []
    size, total = 0, 0
    target = _length(generator)
    for file in sorted(folder.rglob("*")):
        if file.suffix not in SUFFIXES or not file.is_file() or file.is_symlink():
            continue
        text = file.read_text(errors="ignore")
        parts.append(text)
        size += len(text)
        while size >= target:
            whole = "\n".join(parts)
            yield whole[:target]
            total += target
            if total > most:
                return
            parts = [whole[target:]]
            size, target = len(parts[0]), _length(generator)
    if size >= SHORTEST:
        yield "\n".join(parts)


def _length(generator: np.random.Generator) -> int:
    return int(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))


def exercises(folder: Path, generator: np.random.Generator, characters: int) -> Iterator[str]:
    """Samples of all tasks in turn, over the folder's lines, bytes serving as tokens."""
    haystack = Haystack(
        folder, lambda texts: [list(text.encode(errors="ignore")) for text in texts], suffixes=SUFFIXES
    )
    number = total = 0
    while total < characters:
        for task in TASKS:
            room = int(generator.integers(*EXERCISE))
            sample = draw_sample(task, tokens=room, haystack=haystack, seed=77, number=number)
            asked = generator.permutation(np.array(sample.questions, dtype=object))
            text = bytes(sample.context).decode(errors="ignore")
            text += "".join(question.prompt + question.answer for question in asked) + "\n"
            total += len(text)
            yield text
        number += 1


if __name__ == "__main__":
    main()
