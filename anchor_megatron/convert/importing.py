"""Hugging Face to Megatron-Core: a folder that training loads at any parallel layout.

    out/step_0000000/               Megatron-Core's dist_checkpointing files, weights alone
                     config.yaml    the model section of a run's configuration
                     hf_config.json, generation_config.json, tokenizer/    the source's, kept for export

No model is built and no tensor is loaded: rows are copied from file to file, in the order of Megatron-Core's
rows, into pieces of at most `PIECE_BYTES`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from anchor_megatron.config import ModelConfig
from anchor_megatron.convert.aside import check_room, written_aside
from anchor_megatron.convert.dist_files import DistWriter
from anchor_megatron.convert.hf_config import extend, family_of, read_hf_config, read_model
from anchor_megatron.convert.mapping import Entry, Run, entries, extra_states, hf_shapes
from anchor_megatron.convert.rows import Place, row_bytes, same_values, total_bytes
from anchor_megatron.convert.sources import Source, open_source

__all__ = ["PIECE_BYTES", "STEP", "TOKENIZER_FILES", "import_checkpoint"]

PIECE_BYTES = 64 * 2**20
STEP = "step_0000000"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def import_checkpoint(
    hf: Path,
    out: Path,
    *,
    extension: str | None = None,
    overrides: list[str] | None = None,
    allow_pickle: bool = False,
    check_hashes: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[int], Any] = lambda count: None,
) -> ModelConfig:
    """Writes the model in folder `hf` to the new folder `out`; returns the model's configuration.

    extension, overrides: see `hf_config.extend`. progress: called with every number of bytes done; the first
    call has minus the total. Raises ValueError naming the file, field or tensor, OSError where the disk
    refuses.
    """
    description = read_hf_config(hf / "config.json")
    family, model = family_of(description), extend(read_model(description), extension, overrides or [])
    source = open_source(hf, allow_pickle=allow_pickle, check_hashes=check_hashes)
    try:
        model_entries = list(entries(family, model))
        total = _check_tensors(source, model_entries, model, say)
        with written_aside(out, say=say) as folder:
            check_room(folder, total)
            progress(-total)
            step = folder / STEP
            step.mkdir()
            _write_weights(step, source, model_entries, extra_states(family, model), progress)
            _write_description(step, hf, model)
    finally:
        source.close()
    return model


def _check_tensors(
    source: Source, model_entries: list[Entry], model: ModelConfig, say: Callable[[str], None]
) -> int:
    """Bytes of the model, once every tensor is there in its shape, and no other."""
    expected = hf_shapes(model_entries)
    for name, shape in expected.items():
        if name not in source.tensors:
            raise ValueError(f"{name}: got no such tensor, expected one of shape {shape}")
        if source.tensors[name].shape != shape:
            raise ValueError(
                f"{name}: got shape {source.tensors[name].shape}, expected {shape} by config.json"
            )
    dtypes: dict[str, torch.dtype] = {}
    for entry in model_entries:
        for run in entry.runs:
            got = source.tensors[run.name].dtype
            if got != dtypes.setdefault(entry.key, got):
                raise ValueError(
                    f"{run.name}: got {got}, expected {dtypes[entry.key]} as in the tensors it is kept with"
                )
    left_out = _unused(source, expected, model)
    if left_out:
        say(
            f"left out {len(left_out)} tensors that repeat others or follow from config.json, "
            f"such as {left_out[0]}"
        )
    return sum(total_bytes(source.tensors[name]) for name in expected)


def _unused(source: Source, expected: dict[str, Any], model: ModelConfig) -> list[str]:
    """Tensors that need not be converted; ValueError for one that would be lost."""
    left_out = []
    for name, info in source.tensors.items():
        if name in expected:
            continue
        if name == "lm_head.weight" and model.tie_embeddings:
            if not same_values(info, source.tensors["model.embed_tokens.weight"]):
                raise ValueError(
                    f"{name}: got other values than the embedding's; tie_word_embeddings promises the same"
                )
        elif not name.endswith(".rotary_emb.inv_freq"):
            raise ValueError(
                f"{name}: got a tensor of shape {info.shape}, expected none of that name in this family"
            )
        left_out.append(name)
    return left_out


def _write_weights(
    step: Path, source: Source, model_entries: list[Entry], states: list[str], progress: Callable[[int], Any]
) -> None:
    writer = DistWriter(step)
    try:
        for entry in model_entries:
            dtype = source.tensors[entry.runs[0].name].dtype
            size = entry.leading + (entry.shape[0] + entry.padding, *entry.shape[1:])
            row = 0
            for runs in _pieces(entry, PIECE_BYTES // dtype.itemsize):
                rows = sum(run.rows for run in runs)
                for key in (entry.key, *entry.other_keys):
                    offsets = (*entry.index, row, *(0 for _ in entry.shape[1:]))
                    shape = (*(1 for _ in entry.index), rows, *entry.shape[1:])
                    place = writer.lay_out(key, offsets, size, shape, dtype)
                    _fill(place, source, runs)
                row += rows
                progress(rows * math.prod(entry.shape[1:]) * dtype.itemsize)
            if entry.padding:  # a piece of zeros: its values are left a hole in the file
                writer.lay_out(entry.key, (row, 0), size, (entry.padding, *entry.shape[1:]), dtype)
        for state in states:
            writer.write_state(state)
        writer.finish()
    finally:
        writer.close()


def _fill(place: Place, source: Source, runs: list[Run]) -> None:
    for run in runs:
        rows = source.tensors[run.name]
        rows.copy(run.start, run.rows, place)
        place = Place(place.descriptor, place.offset + run.rows * row_bytes(rows))


def _pieces(entry: Entry, most_values: int) -> Iterator[list[Run]]:
    """The entry's runs in order, in pieces of `most_values` values at most (or one row)."""
    most_rows = max(1, most_values // math.prod(entry.shape[1:]))
    piece: list[Run] = []
    room = most_rows
    for run in entry.runs:
        start, left = run.start, run.rows
        while left:
            rows = min(left, room)
            piece.append(Run(run.name, start, rows))
            start, left, room = start + rows, left - rows, room - rows
            if not room:
                yield piece
                piece, room = [], most_rows
    if piece:
        yield piece


def _write_description(step: Path, hf: Path, model: ModelConfig) -> None:
    (step / "config.yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(model)}, sort_keys=False))
    shutil.copyfile(hf / "config.json", step / "hf_config.json")
    if (hf / "generation_config.json").is_file():
        shutil.copyfile(hf / "generation_config.json", step / "generation_config.json")
    (step / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (hf / name).is_file():
            shutil.copyfile(hf / name, step / "tokenizer" / name)
