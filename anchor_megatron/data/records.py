"""One document on its way from a file to token ids: what a preprocessing worker runs (and all that it
imports).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchor_megatron.data.tokenizer import batch_encoder

__all__ = ["Record", "encode", "start_worker"]


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
        if not self.line:
            return text
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.place}: is not JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get(json_key), str):
            got = f"keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{self.place}: got {got}, expected an object with a text under {json_key!r}")
        return value[json_key]


_worker: dict[str, Any] = {}


def start_worker(folder: str, json_key: str, dtype: np.dtype, end: int | None) -> None:
    """Opens the tokenizer in `folder` once a process; `end` is appended to every document."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    encode: Callable[[list[str]], list[list[int]]] = batch_encoder(folder)
    _worker.update(encode=encode, json_key=json_key, dtype=dtype, end=[] if end is None else [end])


def encode(batch: list[Record]) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids of all documents of a batch, each document's length, and the bytes they came from."""
    texts = [record.text(_worker["json_key"]) for record in batch]
    found = [ids + _worker["end"] if ids else ids for ids in _worker["encode"](texts)]
    lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
    ids = np.concatenate([np.asarray(one, dtype=_worker["dtype"]) for one in found])
    return ids, lengths, sum(len(record.raw) for record in batch)
