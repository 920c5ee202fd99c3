"""Checkpoints: saved at one parallel layout, loaded at any.

    <directory>/step_0000100/     Megatron-Core's dist_checkpointing files (model, optimizer)
                    config.yaml   the run's configuration
                    tokenizer/    the data set's tokenizer, so that the model can leave with it
    <directory>/latest            the name of the newest complete one

A checkpoint is written beside its final name and renamed when every rank is done: a folder called step_* is
complete. The position in the data is the step: windows are a function of (seed, step), so there is nothing
else to keep.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from anchor_megatron.config import Config, save_config
from anchor_megatron.data.corpus import parse_sets
from anchor_megatron.data.documents import tokenizer_folder
from anchor_megatron.training.checkpoint_fit import check_fit
from anchor_megatron.training.optimizer import create_optimizer_state
from anchor_megatron.training.step import Trainee

__all__ = ["latest_checkpoint", "load_checkpoint", "load_pretrained", "save_checkpoint"]

_SETTINGS = ("max_lr", "min_lr", "betas", "eps")  # of a parameter group, from the configuration


def save_checkpoint(config: Config, trainee: Trainee, *, step: int) -> Path:
    """Saves the state after `step` steps under `checkpoint.directory`. All ranks call it together."""
    assert config.checkpoint.directory is not None, "a run without checkpoint.directory saves nothing"
    directory = Path(config.checkpoint.directory)
    final, aside = directory / _folder_name(step), directory / f"{_folder_name(step)}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(trainee, loading=False) | {"step": step}, str(aside))
    dist.barrier()
    if dist.get_rank() == 0:
        save_config(config, aside / "config.yaml")
        _copy_tokenizer(config, aside / "tokenizer")
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _point_to(final)
    dist.barrier()
    return final


def load_checkpoint(trainee: Trainee, folder: Path) -> int:
    """Restores model, optimizer and schedule from `folder`; returns the steps taken when it was saved.

    Learning rates and Adam's constants are the configuration's, not the checkpoint's. ValueError where the
    checkpoint is of another model.
    """
    check_fit(trainee.gpt, folder)
    settings = [{key: group[key] for key in _SETTINGS} for group in trainee.optimizer.param_groups]
    state = dist_checkpointing.load(_sharded_state(trainee, loading=True) | {"step": 0}, str(folder))
    trainee.gpt.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(trainee.optimizer.param_groups, settings, strict=True):
        group.update(own)
    trainee.scheduler.load_state_dict(state["scheduler"])
    return int(state["step"])


def load_pretrained(trainee: Trainee, directory: str) -> None:
    """Takes the weights alone from the newest checkpoint in `directory` (or from that checkpoint's own
    folder); ValueError where there is none or it is of another model.
    """
    path = Path(directory)
    folder = path if (path / "metadata.json").is_file() else latest_checkpoint(path)
    if folder is None:
        raise ValueError(f"checkpoint.pretrained: got {directory}, expected a checkpoint or a folder of them")
    check_fit(trainee.gpt, folder)
    state = dist_checkpointing.load(
        {"model": trainee.gpt.sharded_state_dict(metadata=_metadata())}, str(folder)
    )
    trainee.gpt.load_state_dict(state["model"])
    trainee.optimizer.reload_model_params()


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`, None where there is none; ValueError where `latest`
    misleads.
    """
    pointer = directory / "latest"
    if not pointer.is_file():
        return None
    folder = directory / pointer.read_text().strip()
    if not (folder / "metadata.json").is_file():
        raise ValueError(f"{pointer}: names {folder.name}, expected a complete checkpoint's folder beside it")
    return folder


def _copy_tokenizer(config: Config, folder: Path) -> None:
    """The data set's tokenizer, where it still lies beside it."""
    source = tokenizer_folder(parse_sets(config.data.train)[0][0])
    if source.is_dir():
        shutil.copytree(source, folder)


def _folder_name(step: int) -> str:
    return f"step_{step:07d}"


def _point_to(folder: Path) -> None:
    aside = folder.parent / "latest.partial"
    aside.write_text(folder.name + "\n")
    aside.replace(folder.parent / "latest")


def _metadata() -> dict[str, Any]:
    """What makes Megatron-Core write the optimizer in a form that any TP, PP, CP and DP can read."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(trainee: Trainee, *, loading: bool) -> dict[str, Any]:
    create_optimizer_state(trainee.optimizer)
    model = trainee.gpt.sharded_state_dict(metadata=_metadata())
    optimizer = trainee.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_metadata())
    return {"model": model, "optimizer": optimizer, "scheduler": trainee.scheduler.state_dict()}
