"""From what a user names to files, each with its kind and the source its documents are from.

    "data/*.jsonl.gz" src/     a.jsonl.gz  jsonl     b.jsonl.gz  jsonl     src/x.py  text

A folder stands for its files at any depth; one that Hugging Face's `datasets` saved is read as the table it
is. Files are taken in the order of the inputs, those of a pattern or a folder sorted.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["InputFile", "input_files"]

_ENDINGS = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".idx": "indexed"}
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """One file of documents.

    kind    jsonl (a line is a document), parquet and arrow (a row is one), indexed (Megatron's .idx, the .bin
            beside it), text (the file is one)
    source  name of all its documents' source; None where they name it themselves or have none
    """

    path: Path
    kind: str
    source: str | None = None


def input_files(
    inputs: Iterable[str | Path], suffixes: tuple[str, ...] = (), source_from: str | None = None
) -> list[InputFile]:
    """The files behind `inputs`: files, folders (where given, of files with one of `suffixes`), patterns.

    `source_from`: "file" (a file's name without its endings is its documents' source), "folder" or None.
    ValueError naming what is missing or empty.
    """
    found: list[InputFile] = []
    for one in inputs:
        path = Path(one)
        if path.is_dir():
            paths = list(_in_folder(path, suffixes))
        elif path.is_file():
            if not path.stat().st_size:
                raise ValueError(f"{path}: is empty, expected documents")
            paths = [path]
        else:
            paths = [
                match for match in map(Path, sorted(glob.glob(str(one), recursive=True))) if match.is_file()
            ]
        if not paths:
            raise ValueError(f"{one}: no such file or folder, and no pattern of any")
        found += [_described(path, source_from) for path in paths]
    return found


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise ValueError(f"{folder}: holds several data sets, expected one of them: {', '.join(splits)}")
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        yield from _of_saved_dataset(folder)
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not suffixes or path.name.endswith(suffixes)]
    # the tokens beside an index are read with it
    files = [path for path in files if path.suffix != ".bin" or not path.with_suffix(".idx").is_file()]
    if not files:
        raise ValueError(f"{folder}: holds no files{' ending in ' * bool(suffixes)}{', '.join(suffixes)}")
    yield from files


def _of_saved_dataset(folder: Path) -> list[Path]:
    """Files of a folder by `datasets.Dataset.save_to_disk`."""
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_files"):
        raise ValueError(f"{folder}: rows were selected or shuffled; save it after flatten_indices()")
    return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]


def _described(path: Path, source_from: str | None) -> InputFile:
    endings = path.suffixes
    if endings and endings[-1] in _COMPRESSIONS:
        endings = endings[:-1]
    kind = _ENDINGS.get(endings[-1] if endings else "", "text")
    sources = {"file": path.name.split(".")[0], "folder": path.resolve().parent.name}
    return InputFile(path, kind, sources.get(source_from or ""))
