"""Is a data set what it says it is? Every byte is read once, in parts, so that memory stays small.

    index       lengths add up to the .bin, each document begins where the one before it ends, borders rise
    sources     an entry of the summary's for each document
    ids         each below the vocabulary, none above the largest that the summary has, all of its checksum
    summary     documents, tokens and the longest as in the index
    tokenizer   opens, and has the vocabulary and the anchor that the summary names

An id that is no token reads "set.bin: document 17, its token 3: got id 70000, expected ids below 32000". What
is wrong is told part by part.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from anchor_megatron.data.documents import Documents, tokenizer_folder
from anchor_megatron.data.index import in_parts
from anchor_megatron.data.tokenizer import load_tokenizer

__all__ = ["check_data_set"]

_PART = 1 << 22  # tokens read together


def check_data_set(prefix: str | Path, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """What is wrong with the data set at `prefix`, a line each that names the file, and the document where it
    is one; none where all is well. `say` is told of each part that was looked at.
    """
    try:
        documents = Documents(prefix)
        lengths = documents.lengths  # which looks through the index, as opening has through the rest
    except (ValueError, OSError) as error:
        return [str(error)]
    say(f"{prefix}: {len(documents):,} documents, {documents.summary.tokens:,} tokens\nindex: good")
    parts = dict(ids=_ids, summary=_summary, tokenizer=_tokenizer)
    problems = []
    for name, look in parts.items():
        found = list(look(documents, lengths))
        say(f"{name}: " + ("good" if not found else "WRONG"))
        problems += found
    return problems


def _ids(documents: Documents, lengths: np.ndarray) -> Iterator[str]:
    """Every token is one of the vocabulary's, and the largest is the summary's."""
    path, summary, dtype = f"{documents.prefix}.bin", documents.summary, documents.index.dtype
    largest = crc32 = 0
    for first in range(0, summary.tokens, _PART):
        # read, not mapped: pages of a file of terabytes would pile up in memory
        raw = np.fromfile(path, dtype=dtype, count=_PART, offset=first * dtype.itemsize)
        crc32 = zlib.crc32(raw.tobytes(), crc32)
        ids = raw.astype(np.int64)
        wrong = (ids < 0) | (ids >= summary.vocab_size)
        if wrong.any():
            at = int(np.argmax(wrong))
            document, token = _place(lengths, first + at)
            yield (
                f"{path}: document {document}, its token {token}: got id {ids[at]}, expected ids from 0 and "
                f"below vocab_size = {summary.vocab_size}"
            )
            return
        largest = max(largest, int(ids.max()))
    if summary.crc32 not in (None, crc32):
        yield f"{path}: got bytes of CRC-32 {crc32}, expected {summary.crc32} as when they were written"
    if largest != summary.largest_token:
        yield f"{documents.prefix}.json: largest_token: got {summary.largest_token}, but {path} has {largest}"


def _place(lengths: np.ndarray, token: int) -> tuple[int, int]:
    """The document that token `token` of the .bin is in, and which of its tokens it is."""
    for begin, part in in_parts(lengths):
        ends = np.cumsum(part, dtype=np.int64)
        if token < ends[-1]:
            document = int(np.searchsorted(ends, token, side="right"))
            return begin + document, token - int(ends[document] - part[document])
        token -= int(ends[-1])
    raise AssertionError("lengths add up to the file, as opening it has seen")


def _summary(documents: Documents, lengths: np.ndarray) -> Iterator[str]:
    """The longest; opening has held the other counts against the index."""
    longest, told = max(int(part.max()) for _, part in in_parts(lengths)), documents.summary.longest
    if longest != told:
        yield f"{documents.prefix}.json: longest: got {told}, but the index has {longest}"


def _tokenizer(documents: Documents, lengths: np.ndarray) -> Iterator[str]:
    """The tokenizer beside it opens, and is the one that the summary tells of."""
    summary, path = documents.summary, f"{documents.prefix}.json"
    try:
        tokenizer = load_tokenizer(tokenizer_folder(documents.prefix))
    except ValueError as error:
        yield str(error)
        return
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if vocab_size != summary.vocab_size:
        yield f"{path}: vocab_size: got {summary.vocab_size}, but its tokenizer has {vocab_size}"
    if not 0 <= summary.anchor_token < vocab_size:
        yield f"{path}: anchor_token: got {summary.anchor_token}, but its tokenizer has {vocab_size}"
