"""One record on its way from a file to token ids: what a preprocessing worker makes of it.

    Record("a.jsonl:3", b'{"text": "x = 1\\n"}')  ->  "x = 1\\n"  ->  [87, 284, 352, 198]

A record is a line, a row or a whole file; mostly it is one document, a row of tokens with document ends is
several. Records travel raw, so that decoding and parsing are the workers' share too, and what is wrong with
one is said with its file and line. Nothing here imports torch or transformers, so a worker starts in a
fraction of a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Document", "Form", "Record", "Unusable", "documents"]


class Unusable(ValueError):
    """A record or file that cannot be used. `kind` is a short name, under which such ones are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Record:
    """What a reader found.

    place    file, with line or row where it has them
    content  a whole file (bytes), a line of JSON (bytes, `is_json`), a row (dict), token ids (array), or why
             there is none
    source   the source of its documents, where the file says it
    """

    place: str
    content: bytes | dict[str, Any] | np.ndarray | Unusable
    source: str | None = None
    is_json: bool = False

    @property
    def size(self) -> int:
        """About its bytes in memory."""
        if isinstance(self.content, dict):
            return sum(
                8 * len(one) if isinstance(one, list) else len(str(one)) for one in self.content.values()
            )
        if isinstance(self.content, np.ndarray):
            return self.content.nbytes
        return len(self.content) if isinstance(self.content, bytes) else 0


@dataclass(frozen=True)
class Form:
    """Where a row keeps what: keys, with dots into objects in objects.

    text_key    its text
    tokens_key  token ids, in place of a text; document ends are read from `ends_key`
    source_key  the name of its source; None where rows have none
    ends_key    of rows of tokens: [{"end": 1200, "source": "book"}, ...], as Long-Context-Data-Engineering
                (arXiv 2402.10171) has them, ends exclusive, or the same as an object of lists
    """

    text_key: str = "text"
    tokens_key: str | None = None
    source_key: str | None = None
    ends_key: str = "source"


Document = tuple[str | np.ndarray, str | None]  # text or token ids int64, source


def documents(record: Record, form: Form) -> list[Document]:
    """The documents of `record`; Unusable, naming its place, for what is none."""
    content = record.content
    if isinstance(content, Unusable):
        raise content
    if isinstance(content, np.ndarray):
        return [(content, record.source)]
    if isinstance(content, bytes):
        text = _decoded(record.place, content)
        if not record.is_json:
            return [(_checked(record.place, text), record.source)]
        content = _row(record.place, text)
    source = record.source
    if form.source_key is not None:
        source = _value(record.place, content, form.source_key, str, "a name", "--source-key")
    if form.tokens_key is not None:
        return _split(record.place, content, form, source)
    text = _value(record.place, content, form.text_key, str, "a text", "--text-key")
    return [(_checked(record.place, text), source)]


def _decoded(place: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8", f"{place}: byte {error.start} is not UTF-8 ({error.reason})") from error


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unusable("not JSON", f"{place}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise Unusable("not an object", f"{place}: got a JSON {type(value).__name__}, expected an object")
    return value


def _value(place: str, row: dict[str, Any], key: str, kind: type, what: str, option: str) -> Any:
    """What lies under `key`, whole or with dots into objects."""
    found: Any = row
    for part in [key] if key in row else key.split("."):
        if not isinstance(found, dict) or part not in found:
            got = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise Unusable("missing key", f"{place}: got keys {got}, expected {key!r} ({option})")
        found = found[part]
    if not isinstance(found, kind):
        got = type(found).__name__
        raise Unusable("wrong type", f"{place}: got a {got} under {key!r}, expected {what} ({option})")
    return found


def _checked(place: str, text: str) -> str:
    """`text` where it is one: no NUL, which tells of a binary file, no half of a character."""
    at = text.find("\0")
    if at >= 0:
        raise Unusable("NUL byte", f"{place}: got a NUL at character {at}, expected text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise Unusable(
                "lone surrogate", f"{place}: got the lone surrogate {half!r}, expected text"
            ) from error
    return text


def _split(place: str, row: dict[str, Any], form: Form, source: str | None) -> list[Document]:
    """A row of tokens, cut where its documents end."""
    assert form.tokens_key is not None, "rows of tokens have a key for them"
    listed = _value(place, row, form.tokens_key, list, "a list of token ids", "--tokens-key")
    try:
        ids = np.array(listed, dtype=np.int64 if all(type(one) is int for one in listed) else object)
    except OverflowError:
        ids = np.array(listed, dtype=object)
    if ids.dtype == object:
        raise Unusable("wrong type", f"{place}: {form.tokens_key!r}: expected integers below 2^63")
    if form.ends_key not in row:
        return [(ids, source)]
    ends, names = _ends(place, row[form.ends_key], form.ends_key)
    if ends != sorted(ends) or (ends and (ends[0] < 0 or ends[-1] > ids.size)):
        raise Unusable(
            "document ends",
            f"{place}: {form.ends_key!r}: got {ends[:8]}, expected ends that rise within {ids.size} tokens",
        )
    cuts = [end for end in ends if end < ids.size]
    names = (names + names[-1:] + [None])[: len(cuts) + 1]  # what follows the last end is the last source's
    parts = zip(np.split(ids, cuts), names, strict=True)
    return [(part, name if source is None else source) for part, name in parts]


def _ends(place: str, value: Any, key: str) -> tuple[list[int], list[str | None]]:
    """Ends and sources, from a list of objects or an object of lists."""
    if isinstance(value, dict) and isinstance(value.get("end"), list):
        names = value.get("source") or [None] * len(value["end"])
        entries = [{"end": end, "source": name} for end, name in zip(value["end"], names, strict=False)]
    else:
        entries = value
    good = isinstance(entries, list) and all(
        isinstance(one, dict) and type(one.get("end")) is int for one in entries
    )
    if not good:
        raise Unusable("document ends", f"{place}: {key!r}: expected a list of objects with an integer 'end'")
    return [one["end"] for one in entries], [one.get("source") for one in entries]
