"""Checkpoints: saved at one parallel layout without holding up the steps, loaded at any.

    <directory>/step_0000100/     Megatron-Core's dist_checkpointing files (model, optimizer, random
    generators)
                    config.yaml   the run's configuration
                    tokenizer/    the data set's tokenizer, so that the model can leave with it
                    manifest.json sizes and checksums of all these, written last
    <directory>/lock.json         who writes here

    save(step 100)   plan, copy to host memory             step_0000100.partial
    steps 101, 102   a thread writes
    finish()         every rank is done: the manifest, then the rename to step_0000100

So a folder called step_* is complete, and a run that is killed at any point leaves the last one as it was.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from anchor_megatron.config import Config, data_sets, save_config
from anchor_megatron.data.documents import tokenizer_folder
from anchor_megatron.training.async_save import ThreadedStrategy
from anchor_megatron.training.checkpoint_find import (
    clear_unfinished,
    delete,
    delete_old,
    find_fault,
    folder_name,
    latest_checkpoint,
    newest_good,
    step_folders,
)
from anchor_megatron.training.checkpoint_fit import check_fit
from anchor_megatron.training.checkpoint_state import (
    data_position,
    generators,
    model_state,
    restore_generators,
    sharded_state,
    warn_of_other_data,
)
from anchor_megatron.training.lock import RunLock
from anchor_megatron.training.manifest import MANIFEST, Entry, write_manifest
from anchor_megatron.training.safe_load import check_pickles
from anchor_megatron.training.step import Trainee

__all__ = [
    "Checkpointer", "SaveFailed", "latest_checkpoint", "load_checkpoint", "load_pretrained", "newest_good",
    "save_checkpoint",
]  # fmt: skip

_log = logging.getLogger(__name__)

_SETTINGS = ("max_lr", "min_lr", "betas", "eps")  # of a parameter group, from the configuration


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says why. Older ones are as they were."""


@dataclass
class _Pending:
    step: int
    aside: Path
    finalize: list[Any]
    stall: float  # seconds that the training path has waited for this save


@dataclass
class Checkpointer:
    """Saves a run's state under `checkpoint.directory`. All ranks make it, and call its methods, together.

    ValueError where another run writes there, or the folder cannot be written.
    """

    config: Config
    stalls: list[float] = field(default_factory=list)  # seconds the steps waited for each save
    saved: int = 0  # step of the last checkpoint made

    def __post_init__(self) -> None:
        assert self.config.checkpoint.directory is not None, (
            "a run without checkpoint.directory saves nothing"
        )
        self.directory = Path(self.config.checkpoint.directory)
        self._lock: RunLock | None = None
        self._pending: _Pending | None = None
        self._writer = ThreadedStrategy()
        self._strategy = FullyParallelSaveStrategyWrapper(  # every replica writes its share
            self._writer,
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            do_cache_distribution=True,
        )
        error = None
        if dist.get_rank() == 0:
            try:
                self._lock = RunLock(self.directory)
                clear_unfinished(self.directory)
            except ValueError as refused:
                error = str(refused)
        if error := _from_first_rank(error):
            raise ValueError(error)

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return not self._writer.done()

    @property
    def unfinished(self) -> bool:
        """Whether a save was begun that `finish` has not made a checkpoint of."""
        return self._pending is not None

    def save(self, trainee: Trainee, *, step: int, state: dict[str, Any] | None = None) -> None:
        """Begins to save the state after `step` steps; a save under way is finished first.

        state: further plain values to keep, the same on all ranks. Raises SaveFailed.
        """
        self.finish()
        began = time.monotonic()
        aside = self.directory / f"{folder_name(step)}.partial"
        if error := _from_first_rank(self._prepare(aside) if dist.get_rank() == 0 else None):
            raise SaveFailed(error)
        whole = sharded_state(trainee, loading=False) | generators() | {
            "step": step, "state": state or {},
            "data": data_position(self.config, step, (state or {}).get("skipped_batches", 0)),
        }  # fmt: skip
        request = dist_checkpointing.save(
            whole, str(aside), sharded_strategy=self._strategy, async_sharded_save=True
        )
        self._writer.start()
        self._pending = _Pending(step, aside, request.finalize_fns, time.monotonic() - began)

    def finish(self) -> Path | None:
        """Makes the save under way a checkpoint, waiting for it; returns its folder. Raises SaveFailed.

        Call it once no rank is `writing`, and it takes a few collectives and a rename.
        """
        if self._pending is None:
            return None
        began = time.monotonic()
        pending, self._pending = self._pending, None
        self._writer.wait()
        try:
            for finalize in pending.finalize:
                finalize()
        except CheckpointException as failed:  # raised on all ranks; the first one knows why
            if dist.get_rank() == 0:
                shutil.rmtree(pending.aside, ignore_errors=True)
            why = "; ".join(f"rank {rank}: {error[0]}" for rank, error in failed.failures.items())
            raise SaveFailed(f"{pending.aside}: {why or 'the first rank says why'}") from failed
        final = self._commit(pending)
        self.saved = pending.step
        self.stalls.append(pending.stall + time.monotonic() - began)
        if dist.get_rank() == 0:
            print(
                f"saved {final} (steps waited {self.stalls[-1]:.3f} s, "
                f"written in {self._writer.seconds:.3f} s)",
                flush=True,
            )
        return final

    def go_back(self, step: int) -> None:
        """Deletes the checkpoints behind `step`, as the run goes another way from there."""
        assert self._pending is None, "a save under way is finished first"
        if self._lock is not None:
            self._lock.check()
            delete(self.directory, [later for later in step_folders(self.directory) if later > step])
        self.saved = step

    def close(self) -> None:
        """Waits for what is being written, without making a checkpoint of it, and gives the folder back."""
        self._writer.wait()
        if self._lock is not None:
            self._lock.release()

    def _prepare(self, aside: Path) -> str | None:
        """An empty folder to write to, on the first rank; else what stands in the way."""
        newest = latest_checkpoint(self.directory)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            needed = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            return f"{error.filename or aside}: {error.strerror}"
        if free < needed:
            shutil.rmtree(aside, ignore_errors=True)
            return (
                f"{self.directory}: got {free / 1e6:.1f} MB free on its disk, expected {needed / 1e6:.1f} MB"
            )
        return None

    def _commit(self, pending: _Pending) -> Path:
        written: list[dict[str, Entry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(written, self._writer.entries)
        error = None
        final = self.directory / folder_name(pending.step)
        if dist.get_rank() == 0:
            known = {name: entry for entries in written for name, entry in entries.items()}
            try:
                self._publish(pending, final, known)
            except (OSError, ValueError) as failed:
                error = f"{getattr(failed, 'filename', None) or pending.aside}: {failed}"
                shutil.rmtree(pending.aside, ignore_errors=True)
        if error := _from_first_rank(error):
            raise SaveFailed(error)
        return final

    def _publish(self, pending: _Pending, final: Path, known: dict[str, Entry]) -> None:
        save_config(self.config, pending.aside / "config.yaml")
        source = tokenizer_folder(data_sets(self.config.data.train)[0][0])
        if source.is_dir():
            shutil.copytree(source, pending.aside / "tokenizer")
        write_manifest(pending.aside, step=pending.step, known=known)
        assert self._lock is not None, "the first rank holds the folder"
        self._lock.check()
        if final.exists():  # of a run that went this far before, and fell back to an older one
            replaced = final.with_name(f"{final.name}.deleted")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            pending.aside.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            pending.aside.rename(final)
        kept = self.config.checkpoint
        delete_old(self.directory, keep_last=kept.keep_last, keep_every=kept.keep_every)


def save_checkpoint(config: Config, trainee: Trainee, *, step: int) -> Path:
    """Saves the state after `step` steps under `checkpoint.directory`, at once. All ranks call it."""
    checkpointer = Checkpointer(config)
    try:
        checkpointer.save(trainee, step=step)
        final = checkpointer.finish()
    finally:
        checkpointer.close()
    assert final is not None, "a save was begun"
    return final


def load_checkpoint(config: Config, trainee: Trainee, folder: Path) -> tuple[int, dict[str, Any]]:
    """Restores all from `folder`, which `newest_good` has found whole; returns the steps taken when it was
    saved and what was kept with it.

    Learning rates and Adam's constants are the configuration's, not the checkpoint's. ValueError where the
    checkpoint is of another model.
    """
    check_fit(trainee.gpt, folder)
    warn_of_other_data(config, folder)
    settings = [{key: group[key] for key in _SETTINGS} for group in trainee.optimizer.param_groups]
    wanted = sharded_state(trainee, loading=True) | {"step": 0, "data": {}, "state": {}}
    state = dist_checkpointing.load(wanted, str(folder))
    trainee.gpt.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(trainee.optimizer.param_groups, settings, strict=True):
        group.update(own)
    trainee.scheduler.num_steps = 0  # to which loading adds: a run that rewinds has taken steps
    trainee.scheduler.load_state_dict(state["scheduler"])
    restore_generators(config, folder)
    return int(state["step"]), state["state"]


def load_pretrained(trainee: Trainee, directory: str) -> None:
    """Takes the weights alone from the newest checkpoint in `directory` (or from that checkpoint's own
    folder); ValueError where there is none, it is of another model, or a pickle in it holds more than data.
    """
    path = Path(directory)
    folder = path if (path / "metadata.json").is_file() else latest_checkpoint(path)
    if folder is None:
        raise ValueError(f"checkpoint.pretrained: got {directory}, expected a checkpoint or a folder of them")
    if (folder / MANIFEST).is_file():
        if fault := find_fault(folder):
            raise ValueError(fault)
    else:
        check_pickles(folder)
        if dist.get_rank() == 0:
            _log.warning("%s: no %s, so that a damaged byte would not be noticed", folder, MANIFEST)
    check_fit(trainee.gpt, folder)
    state = dist_checkpointing.load({"model": model_state(trainee)}, str(folder))
    trainee.gpt.load_state_dict(state["model"])
    trainee.optimizer.reload_model_params()


def _from_first_rank(message: str | None) -> str | None:
    """The first rank's message, on every rank."""
    shared = [message]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
