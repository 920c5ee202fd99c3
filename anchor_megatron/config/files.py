"""Configurations from YAML, dotted overrides and dictionaries, and back to YAML."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchor_megatron.config.checks import check_config
from anchor_megatron.config.fields import Config, ModelConfig
from anchor_megatron.presets import MODEL_PRESETS

__all__ = ["data_config", "load_config", "model_config", "read_sections", "save_config"]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration in the YAML file `path` with dotted `overrides` ("train.steps=3") laid over it.

    ValueError, naming the field, for what is unknown, of the wrong type, missing or cannot run together.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"configuration {path}: expected a YAML file, got none there")
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides or [])))
    except Exception as error:  # yaml's scanner and omegaconf each have a family of errors
        raise ValueError(f"configuration {path}: {error}") from error
    config = _structured(given, str(path))
    check_config(config)
    return config


def data_config(target: str, overrides: list[str] | None = None) -> Config:
    """The configuration in the YAML file `target`, or one of the data set with the prefix `target`, with
    dotted `overrides`: for tools that look at data. ValueError as from `load_config`.
    """
    if target.endswith((".yaml", ".yml")):
        return load_config(target, overrides)
    words = [f"data.train={target}", *(overrides or [])]
    try:
        given = OmegaConf.from_dotlist(words)
    except Exception as error:  # as in load_config
        raise ValueError(f"configuration {' '.join(words)}: {error}") from error
    config = _structured(given, "of the command line")
    check_config(config)
    return config


def model_config(values: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from a dictionary (as in a checkpoint), presets expanded, unknown keys refused."""
    return _structured(OmegaConf.create({"model": values, "data": {"train": "-"}}), "model").model


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a configuration that `save_config` wrote, as they stand there, whatever their fields (a
    checkpoint may be older than this code). ValueError naming the file where it holds anything else.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a run's configuration, got {error}") from error
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise ValueError(f"{path}: expected sections of fields, got {type(found).__name__}")
    return found


def save_config(config: Config, path: str | Path) -> None:
    """Writes `config` as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def _structured(given: Any, source: str) -> Config:
    """`given` as dataclasses; ValueError naming `source` and the field for what does not fit them."""
    try:
        preset = OmegaConf.select(given, "model.preset")
        if preset is not None:
            if preset not in MODEL_PRESETS:
                known = ", ".join(sorted(MODEL_PRESETS))
                raise ValueError(f"model.preset: got {preset!r}, expected one of {known}")
            given = OmegaConf.merge({"model": MODEL_PRESETS[preset]}, given)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"configuration {source}: {name}{str(error).splitlines()[0]}") from error
    assert isinstance(config, Config), f"got {type(config)}, expected Config"
    return config
