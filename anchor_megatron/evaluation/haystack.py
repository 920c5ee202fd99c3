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

__all__ = ["Encode", "Haystack"]

Encode = Callable[[list[str]], list[list[int]]]

_MOST_CHARACTERS = 8_000_000  # of the folder: filler for 1M tokens, and then some


class Haystack:
    """The lines of a folder as token lists."""

    def __init__(self, folder: Path, encode: Encode, *, suffixes: tuple[str, ...] = ()) -> None:
        """Reads the folder's files in order, at most some 8 million characters; ValueError for no text."""
        text: list[str] = []
        size = 0
        files = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        for file in files:
            if not file.is_file() or (suffixes and file.suffix not in suffixes):
                continue
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
