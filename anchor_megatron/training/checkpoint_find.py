"""Which checkpoint to go on from, and which to delete.

    step_0000100   step_0000200   step_0000300   step_0000400.partial   step_0000050.deleted
                                  the newest good one                   never looked at

A folder called step_* was complete when it took its name. Whether it still is, its manifest tells: a torn
or corrupt one is passed over for the next older, with a warning that names the file. Where none is left,
the run does not start over in silence.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from pathlib import Path

import torch.distributed as dist

from anchor_megatron.training.manifest import check_files, read_manifest
from anchor_megatron.training.safe_load import check_pickles

__all__ = [
    "clear_unfinished",
    "delete",
    "delete_old",
    "find_fault",
    "folder_name",
    "latest_checkpoint",
    "newest_good",
    "step_folders",
]

_log = logging.getLogger(__name__)


def folder_name(step: int) -> str:
    """Of the checkpoint after `step` steps."""
    return f"step_{step:07d}"


def step_folders(directory: Path) -> dict[int, Path]:
    """Checkpoints in `directory` by step, the newest first, whatever is in them."""
    found = {
        int(match[1]): path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if (match := re.fullmatch(r"step_(\d{7,})", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest folder in `directory` that holds a checkpoint of Megatron-Core's, None where there is
    none.
    """
    return next(
        (path for path in step_folders(directory).values() if (path / "metadata.json").is_file()), None
    )


def newest_good(directory: Path, *, latest: int | None = None) -> Path | None:
    """The newest checkpoint, of step `latest` at most, whose every byte is as it was written, or None.

    All ranks call it together and share the reading. ValueError where there are some and none is good.
    """
    found = step_folders(directory)
    shared = [[folder for step, folder in found.items() if latest is None or step <= latest]]
    dist.broadcast_object_list(shared, src=0)
    for folder in shared[0]:
        fault = find_fault(folder)
        if fault is None:
            return folder
        if dist.get_rank() == 0:
            _log.warning("%s\n    passing over checkpoint %s", fault, folder.name)
    if shared[0]:
        raise ValueError(
            f"checkpoint.directory: {directory}: got {len(shared[0])} checkpoints of which none is whole, "
            "expected a good one; repair one or move them away to start over"
        )
    return None


def find_fault(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, None where nothing is. All ranks call it together."""
    try:
        entries = read_manifest(folder)
        order = sorted(entries, key=lambda name: entries[name]["bytes"], reverse=True)
        fault = check_files(folder, entries, order[dist.get_rank() :: dist.get_world_size()])
        if fault is None and dist.get_rank() == 0:
            check_pickles(folder)
    except ValueError as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((found for found in faults if found is not None), None)


def delete_old(directory: Path, *, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Deletes checkpoints beyond the `keep_last` newest good ones, but those of steps that `keep_every`
    divides.

    Good: whole by name and size; one that is not neither counts nor is deleted. Returns the steps deleted.
    """
    if keep_last is None:
        return []
    good = [step for step, folder in step_folders(directory).items() if _looks_whole(folder)]
    spared = {step for step in good if keep_every and step % keep_every == 0}
    deleted = [step for step in good[keep_last:] if step not in spared]
    delete(directory, deleted)
    return deleted


def delete(directory: Path, steps: list[int]) -> None:
    """Deletes the checkpoints of these steps; the files go in a thread of their own."""
    doomed = [directory / f"{folder_name(step)}.deleted" for step in steps]
    for step, aside in zip(steps, doomed, strict=True):
        if aside.exists():  # of the same step, deleted a moment ago
            shutil.rmtree(aside, ignore_errors=True)
        (directory / folder_name(step)).rename(aside)  # half deleted, it must not look like a checkpoint
    if doomed:
        threading.Thread(target=_remove, args=(doomed,), name="checkpoint-deleter").start()


def clear_unfinished(directory: Path) -> None:
    """Removes what a run that was killed left half written or half deleted."""
    _remove([path for mark in ("partial", "deleted") for path in directory.glob(f"step_*.{mark}")])


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _looks_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ValueError as error:
        _log.warning("%s\n    %s does not count as a checkpoint", error, folder.name)
        return False
    return True
