"""From an input file to its records, one at a time: memory does not grow with the file.

    a.jsonl.zst    a line each          b.parquet, c-00000.arrow    a row each
    d.txt          one                  e.idx, e.bin                a document's tokens each

What is wrong with a file comes as a record too (`Unusable`), the last one where the rest cannot be read:
whether it ends the run or is counted is not decided here.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anchor_megatron.data.index import Index
from anchor_megatron.data.inputs import InputFile
from anchor_megatron.data.records import Form, Record, Unusable

__all__ = ["records"]

_CHUNK = 1 << 20  # bytes read and unpacked at once
_ROWS = 32  # of a table, decoded at once: a row may be a book


def records(file: InputFile, form: Form, *, largest: int) -> Iterator[Record]:
    """The records of `file`; a line or text of over `largest` bytes is Unusable. Blank lines are none.

    ValueError where the package that reads the file is not installed, or a table has no such column.
    """
    try:
        if file.kind == "text":
            yield from _text(file, largest)
        elif file.kind == "jsonl":
            yield from _lines(file, largest)
        elif file.kind == "indexed":
            yield from _indexed(file)
        else:
            yield from _table(file, form)
    except Unusable as error:
        yield Record(str(file.path), error, file.source)


def _text(file: InputFile, largest: int) -> Iterator[Record]:
    with _opened(file.path) as stream:
        content = _guarded(stream.read, largest + 1, str(file.path))
    if len(content) > largest:
        raise _too_large(str(file.path), "text", largest)
    yield Record(str(file.path), content, file.source)


def _lines(file: InputFile, largest: int) -> Iterator[Record]:
    with _opened(file.path) as stream:
        number = 0
        while line := _guarded(stream.readline, largest + 1, f"{file.path}: behind line {number}"):
            number += 1
            place = f"{file.path}:{number}"
            if len(line) > largest:
                yield Record(place, _too_large(place, "line", largest))
                while line and not line.endswith(b"\n"):
                    line = _guarded(stream.readline, _CHUNK, place)
            elif not line.isspace():
                yield Record(place, line, file.source, is_json=True)


def _too_large(place: str, what: str, largest: int) -> Unusable:
    return Unusable("too large", f"{place}: got a {what} of over {largest:,} bytes (--max-bytes)")


def _guarded(read: Any, size: int, place: str) -> bytes:
    """`read(size)`; Unusable where the packed bytes are damaged or end too early."""
    try:
        return read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise Unusable("damaged file", f"{place}: cannot be unpacked ({error})") from error


def _opened(path: Path) -> io.BufferedIOBase:
    """The file's bytes, unpacked."""
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path), _CHUNK)
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Unpacked bytes of a .zst file of any number of frames. The library's own reader takes the end of the
    file for the end of a frame that is not over.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path}: needs the package zstandard (pip install zstandard)") from error
        self._errors = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor()
        self._file = path.open("rb")
        self._frame = self._unpacker.decompressobj()
        self._inside = False  # of a frame
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data or self._file.read(_CHUNK // 8)
            if self._frame.eof:
                self._frame, self._inside = self._unpacker.decompressobj(), False
            if not packed:
                if self._inside:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._inside = True
            try:
                self._ready = self._frame.decompress(packed)
            except self._errors as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _table(file: InputFile, form: Form) -> Iterator[Record]:
    """Rows of a Parquet file or an Arrow stream, of the columns that `form` names."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file.path}: needs the package pyarrow (pip install pyarrow)") from error
    number = 0
    try:
        if file.kind == "parquet":
            table = pyarrow.parquet.ParquetFile(file.path)
            columns = _columns(file.path, table.schema_arrow.names, form)
            parts = table.iter_batches(_ROWS, columns=columns)
        else:
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file.path)))
            columns = _columns(file.path, stream.schema.names, form)
            parts = (part.slice(at, _ROWS) for part in stream for at in range(0, part.num_rows, _ROWS))
        for part in parts:
            for row in part.select(columns).to_pylist():
                number += 1
                yield Record(f"{file.path}: row {number}", row, file.source)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unusable(
            "damaged file", f"{file.path}: cannot be read behind row {number} ({error})"
        ) from error


def _columns(path: Path, names: list[str], form: Form) -> list[str]:
    """Columns that `form` asks for; ValueError where the table lacks one."""
    asked = [(form.tokens_key, "--tokens-key")] if form.tokens_key else [(form.text_key, "--text-key")]
    asked += [(form.source_key, "--source-key")] if form.source_key else []
    columns = [form.ends_key] if form.tokens_key and form.ends_key in names else []
    for key, option in asked:
        assert key is not None, "only keys that were given are asked for"
        column = key if key in names else key.split(".")[0]
        if column not in names:
            raise Unusable("missing key", f"{path}: got columns {sorted(names)}, expected {key!r} ({option})")
        columns.append(column)
    return list(dict.fromkeys(columns))


def _indexed(file: InputFile) -> Iterator[Record]:
    tokens_path = file.path.with_suffix(".bin")
    try:
        index = Index(str(file.path))
        size = tokens_path.stat().st_size if tokens_path.is_file() else 0
        if size != index.bytes:
            raise ValueError(
                f"{tokens_path}: got {size} bytes, expected the {index.bytes} that the index counts"
            )
        tokens = np.asarray(np.memmap(tokens_path, dtype=index.dtype, mode="r")) if size else np.zeros(0)
        start = 0
        for number, length in enumerate(index.lengths):
            ids = tokens[start : start + int(length)].astype(np.int64)
            start += int(length)
            yield Record(f"{file.path}: document {number}", ids, file.source)
    except ValueError as error:
        raise Unusable("damaged file", str(error)) from error
