"""Megatron-Core to Hugging Face: a folder that `AutoModelForCausalLM.from_pretrained` opens.

Reads the weights of any training checkpoint (optimizer state stays behind) piece by piece and writes each
piece's rows where they belong in the safetensors files. config.json comes from the imported source's own file
where there is one, with what training changed; the tokenizer and the generation settings come along. They are
looked for in the checkpoint, and in the checkpoint that the run started from (`checkpoint.pretrained` in its
config.yaml).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anchor_megatron.config import ModelConfig, model_config, read_sections
from anchor_megatron.convert.aside import check_room, written_aside
from anchor_megatron.convert.dist_files import DistReader
from anchor_megatron.convert.families import FAMILIES
from anchor_megatron.convert.hf_config import read_hf_config, write_hf_config
from anchor_megatron.convert.importing import TOKENIZER_FILES
from anchor_megatron.convert.mapping import Entry, Run, entries
from anchor_megatron.convert.rows import row_bytes
from anchor_megatron.convert.safetensors_writer import SafetensorsWriter, TensorInfo
from anchor_megatron.data.tokenizer import load_tokenizer
from anchor_megatron.training.checkpoint import latest_checkpoint

__all__ = ["checkpoint_folder", "export_checkpoint", "read_checkpoint_model"]

_MODEL_PREFIXES = ("decoder.", "embedding.", "output_layer.")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_checkpoint(
    megatron: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Writes the checkpoint in `megatron` (a step's folder, or a folder of them: the newest) to the new
    folder `out`.

    tokenizer: a folder to take the tokenizer from instead. progress: as in `import_checkpoint`. Raises
    ValueError naming the file, field or key, OSError where the disk refuses.
    """
    step = checkpoint_folder(megatron)
    model, longest = read_checkpoint_model(step)
    origins = [step, *_started_from(step)]
    tokenizer = tokenizer or _find_tokenizer(origins)
    reader = DistReader(step)
    try:
        hf = _description(reader, model, longest, origins, tokenizer)
        model_entries = _entries_found(reader, hf, model)
        tensors = _hf_tensors(reader, model_entries)
        with written_aside(out, say=say) as folder:
            total = sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors.values())
            check_room(folder, total)
            progress(-total)
            (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
            _write_companions(folder, origins, tokenizer, hf, say)
            _write_weights(folder, tensors, reader, model_entries, progress)
    finally:
        reader.close()


def checkpoint_folder(path: Path) -> Path:
    """The step's folder that `path` is or whose newest it holds; ValueError where there is none."""
    if (path / "metadata.json").is_file():
        return path
    step = latest_checkpoint(path) if path.is_dir() else None
    if step is None:
        raise ValueError(f"{path}: expected a checkpoint's folder or a folder of them, got neither")
    return step


def read_checkpoint_model(step: Path) -> tuple[ModelConfig, int]:
    """The model of a checkpoint, and the longest context it was meant for."""
    run = _read_run(step)
    try:
        model = model_config(run["model"])
        longest = model.max_position_embeddings or int(run["data"]["seq_length"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{step / 'config.yaml'}: expected model and data.seq_length, got none: {error}"
        ) from error
    if model.vocab_size is None:
        raise ValueError(
            f"{step / 'config.yaml'}: model.vocab_size: got null, expected the vocabulary's size"
        )
    return model, longest


def _read_run(step: Path) -> dict[str, Any]:
    path = step / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path}: expected the run's configuration, got no such file")
    return read_sections(path)


def _started_from(step: Path) -> list[Path]:
    """The checkpoint whose weights the run took, where it is still there."""
    pretrained = (_read_run(step).get("checkpoint") or {}).get("pretrained")
    if pretrained is None or not Path(pretrained).is_dir():
        return []
    return [checkpoint_folder(Path(pretrained))]


def _find_tokenizer(origins: list[Path]) -> Path | None:
    """The imported model's own tokenizer, else the one that training kept: the data set's."""
    folders = [at / "tokenizer" for at in reversed(origins)]
    return next((folder for folder in folders if folder.is_dir() and any(folder.iterdir())), None)


def _token_ids(tokenizer: Path) -> dict[str, Any]:
    opened = load_tokenizer(tokenizer)
    return {name: getattr(opened, name) for name in _TOKEN_IDS}


def _description(
    reader: DistReader, model: ModelConfig, longest: int, origins: list[Path], tokenizer: Path | None
) -> dict[str, Any]:
    """The config.json to write."""
    found = next((at / "hf_config.json" for at in origins if (at / "hf_config.json").is_file()), None)
    source = read_hf_config(found) if found is not None else None
    return write_hf_config(
        model,
        source,
        torch_dtype=str(reader.dtype("embedding.word_embeddings.weight")).removeprefix("torch."),
        longest=longest,
        token_ids=_token_ids(tokenizer) if source is None and tokenizer is not None else {},
    )


def _entries_found(reader: DistReader, hf: dict[str, Any], model: ModelConfig) -> list[Entry]:
    """The model's entries under the keys this checkpoint has. ValueError: one does not fit."""
    found = []
    known: set[str] = set()
    for entry in entries(FAMILIES[hf["model_type"]], model):
        keys = (entry.key, *entry.other_keys)
        known.update(keys)
        key = next((key for key in keys if key in reader.tensors), None)
        if key is None:
            raise ValueError(f"{reader.folder}: {entry.key}: got no such tensor, expected one")
        got, expected = tuple(reader.tensors[key].size), entry.leading + entry.shape
        vocabulary = not entry.index and len(entry.shape) == 2  # padded, perhaps for other layouts than ours
        if got != expected and not (vocabulary and got[0] >= expected[0] and got[1:] == expected[1:]):
            raise ValueError(f"{reader.folder}: {key}: got shape {got}, expected {expected} by config.yaml")
        found.append(dataclasses.replace(entry, key=key))
    for key in reader.tensors:
        if key.startswith(_MODEL_PREFIXES) and key not in known:
            raise ValueError(f"{reader.folder}: {key}: got a tensor that {hf['model_type']} has no place for")
    return found


def _hf_tensors(reader: DistReader, model_entries: list[Entry]) -> dict[str, TensorInfo]:
    rows: dict[str, int] = {}
    tensors = {}
    for entry in model_entries:
        dtype = reader.dtype(entry.key)
        for run in entry.runs:
            rows[run.name] = max(rows.get(run.name, 0), run.start + run.rows)
            tensors[run.name] = TensorInfo((rows[run.name], *entry.shape[1:]), dtype)
    return tensors


def _write_weights(
    folder: Path,
    tensors: dict[str, TensorInfo],
    reader: DistReader,
    model_entries: list[Entry],
    progress: Callable[[int], Any],
) -> None:
    writer = SafetensorsWriter(folder, tensors)
    try:
        for entry in model_entries:
            _write_entry(writer, reader, entry, progress)
        writer.finish()
    finally:
        writer.close()


def _write_entry(
    writer: SafetensorsWriter, reader: DistReader, entry: Entry, progress: Callable[[int], Any]
) -> None:
    """Sends every row of the entry to its tensor; those that pad the vocabulary stay behind."""
    runs = iter(entry.runs)
    run: Run | None = next(runs)
    done = row = 0  # of this run; of the entry
    for start, band in reader.bands(entry.key, entry.index):
        if start != row and row < entry.shape[0]:
            raise ValueError(f"{reader.folder}: {entry.key}: got no rows [{row}, {start}) at {entry.index}")
        at = 0
        while run is not None and at < band.shape[0]:
            count = min(run.rows - done, band.shape[0] - at)
            writer.write(run.name, run.start + done, band, at, count)
            progress(count * row_bytes(band))
            at, done, row = at + count, done + count, row + count
            if done == run.rows:
                run, done = next(runs, None), 0
    if run is not None:
        raise ValueError(
            f"{reader.folder}: {entry.key}: got {row} rows at {entry.index}, expected {entry.shape[0]}"
        )


def _write_companions(
    folder: Path, origins: list[Path], tokenizer: Path | None, hf: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Tokenizer and generation settings."""
    if tokenizer is None:
        say("no tokenizer: the checkpoint has none with it; --tokenizer DIR adds one")
    else:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    generation = next(
        (at / "generation_config.json" for at in origins if (at / "generation_config.json").exists()), None
    )
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")
    else:
        settings = {name: hf[name] for name in _TOKEN_IDS if hf.get(name) is not None}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
