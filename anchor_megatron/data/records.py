"""One document on its way from a file to token ids: what a preprocessing worker runs.

    Record("a.jsonl", 3, b'{"text": "x = 1\\n"}')  ->  "x = 1\\n"  ->  [87, 284, 352, 198]

Records travel as bytes, so that decoding and parsing are the workers' share too; an error names the file and
the line it is in. Nothing here imports torch or transformers, so a worker starts in a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anchor_megatron.data.tokenizer import batch_encoder

__all__ = ["Encoded", "Encoder", "Record"]


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file; `line` counts from 1, 0 where the whole file is one document."""

    path: str
    line: int
    raw: bytes

    @property
    def place(self) -> str:
        """File, and line where it has one."""
        return f"{self.path}:{self.line}" if self.line else self.path

    def text(self, json_key: str) -> str:
        """The document's text; ValueError naming file and line for what is no UTF-8, no JSON, or lacks the
        key.
        """
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place}: byte {error.start} is not UTF-8 ({error.reason})") from error
        return self._json_text(text, json_key) if self.line else text

    def _json_text(self, line: str, json_key: str) -> str:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.place}: is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(
                f"{self.place}: got a JSON {type(value).__name__}, expected an object with a text under "
                f"{json_key!r}"
            )
        if json_key not in value:
            raise ValueError(f"{self.place}: got keys {sorted(value)}, expected {json_key!r} (--json-key)")
        text = value[json_key]
        if not isinstance(text, str):
            raise ValueError(f"{self.place}: got a {type(text).__name__} under {json_key!r}, expected a text")
        if "\\u" in line:  # only an escape can spell half of a character
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise ValueError(f"{self.place}: got the lone surrogate {half!r}, expected text") from error
        return text


@dataclass(frozen=True)
class Encoded:
    """A batch of documents as token ids."""

    ids: np.ndarray
    """[tokens] of all documents, one after another, in the data set's dtype"""
    lengths: np.ndarray
    """int64 [documents], 0 for those without text"""
    bytes_read: int
    paths: frozenset[str]
    """files that held text"""


@dataclass(frozen=True)
class Encoder:
    """Encodes batches. `tokens_of`: texts to token ids; `end`: what ends every document that has text."""

    tokens_of: Callable[[list[str]], list[list[int]]]
    json_key: str
    dtype: np.dtype
    end: list[int]

    @classmethod
    def open(cls, source: str | Path, json_key: str, dtype: np.dtype, end: list[int]) -> Encoder:
        """The encoder of tokenizer.encoder_source's `source`."""
        return cls(batch_encoder(source), json_key, dtype, end)

    def __call__(self, batch: list[Record]) -> Encoded:
        texts = [record.text(self.json_key) for record in batch]
        has_text = [bool(text) and not text.isspace() for text in texts]
        found = iter(self.tokens_of([text for text, has in zip(texts, has_text, strict=True) if has]))
        rows = [self._row(next(found)) if has else self._row([]) for has in has_text]
        return Encoded(
            ids=np.concatenate(rows),
            lengths=np.array([row.size for row in rows], dtype=np.int64),
            bytes_read=sum(len(record.raw) for record in batch),
            paths=frozenset(record.path for record, row in zip(batch, rows, strict=True) if row.size),
        )

    def _row(self, ids: list[int]) -> np.ndarray:
        return np.array(ids + self.end if ids else ids, dtype=self.dtype)
