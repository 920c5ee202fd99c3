"""Filler text for long contexts: the lines of a folder's files, in any tokenizer's tokens.

    lines of the folder   "import os" "" "def main():" ...        tokenised one by one, each with its line end
    fill(7 tokens)        lines from a drawn place on, the last cut to make exactly 7 tokens

Lines are tokenised one by one so that a needle can stand between any two of them and a context has exactly as
many tokens as asked for. A folder shorter than a context is gone through again from its beginning;
`Haystack.tokens` tells how long it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["Encode", "Haystack", "read_documents"]

Encode = Callable[[list[str]], list[list[int]]]

_MOST_CHARACTERS = 8_000_000  # of the folder: filler for 1M tokens, and then some


class Haystack:
    """The lines of a folder as token lists."""

    def __init__(self, folder: Path, encode: Encode, *, suffixes: tuple[str, ...] = ()) -> None:
        """Reads the folder's files in order, at most some 8 million characters; ValueError for no text."""
        text: list[str] = []
        size = 0
        for file in _files(folder, suffixes):
            lines = file.read_text(errors="replace").splitlines(keepends=True)
            text += lines
            size += sum(map(len, lines))
            if size > _MOST_CHARACTERS:
                break
        self.lines = [line for line in encode(text) if line]
        if not self.lines:
            raise ValueError(f"{folder}: got no text, expected files with lines")
        self.encode = encode
        self.tokens = sum(map(len, self.lines))

    def fill(self, tokens: int, generator: np.random.Generator) -> list[list[int]]:
        """Consecutive lines, from a drawn one on, of `tokens` tokens altogether."""
        at, left, found = int(generator.integers(len(self.lines))), tokens, []
        while left > 0:
            line = self.lines[at % len(self.lines)][:left]
            found.append(line)
            left -= len(line)
            at += 1
        return found


def read_documents(folder: Path, encode: Encode, *, suffixes: tuple[str, ...] = ()) -> list[np.ndarray]:
    """Every file of a folder as one document, int64 [tokens]."""
    texts = [file.read_text(errors="replace") for file in _files(folder, suffixes)]
    return [np.array(tokens, dtype=np.int64) for tokens in encode(texts)]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The folder's files, sorted, with one of `suffixes` if any are given; ValueError for no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one with text files")
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file for file in found if not suffixes or file.suffix in suffixes]
