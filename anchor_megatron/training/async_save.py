"""Megatron-Core's checkpoint saving with its writing moved to a thread of the training process.

    training thread     plan, copy to host memory |  step  |  step  |  step  | finish (all ranks together)
    writer thread                                 | files, fsync, SHA-256 |

Megatron-Core's own writers are forked from the training process, which torch does not support once CUDA,
NCCL or OpenMP threads run (a forked child that touches a lock of theirs waits forever), and report through
a spawned process of its own. Files are written with the interpreter's lock released, so a thread costs the
steps nothing. Planning, format and the metadata are Megatron-Core's.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_finalize
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from anchor_megatron.training.manifest import Entry, entry_of

__all__ = ["ThreadedStrategy"]


class ThreadedStrategy(TorchDistSaveShardedStrategy):
    """`torch_dist` saving. After Megatron-Core's `save(..., async_sharded_save=True)`: `start`, then `done`
    until it is true on all ranks, then the request's finalize functions.

    entries: the files that this rank wrote, once it is done.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.entries: dict[str, Entry] = {}
        self.seconds = 0.0  # that the last writing took
        self._writer: FileSystemWriterAsync | None = None
        self._buffers: dict[
            tuple[int, int], Tensor
        ] = {}  # page-locked where there is a GPU; kept between saves
        self._thread: threading.Thread | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """Plans the save. All ranks call it together."""
        if filesystem_async._results_queue is None:  # else it starts a process to serve one
            filesystem_async._results_queue = queue.Queue()
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def start(self) -> None:
        """Copies what this rank writes to host memory and starts to write it."""
        assert self._writer is not None and self._thread is None, "a save is planned and none under way"
        buckets = [
            (path, name, (bytes_data, [(item, self._copy(i, j, x)) for j, (item, x) in enumerate(tensors)]))
            for i, (path, name, (bytes_data, tensors)) in enumerate(self._writer.write_buckets or [])
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._writer.write_buckets = [("", "", ([], []))] * len(buckets)  # the originals need not be kept
        self._thread = threading.Thread(
            target=self._write, args=(self._writer, buckets), name="checkpoint-writer"
        )
        self._thread.start()

    def done(self) -> bool:
        """Whether this rank's files are written, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when `done`; another save can then be planned."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self._writer, self.entries = writer, {}
        return AsyncRequest(None, (), [lambda: save_state_dict_async_finalize(*save_state_dict_ret)])

    def _copy(self, bucket: int, place: int, value: Tensor) -> Tensor:
        """`value` in host memory, where the next steps do not change it."""
        buffer = self._buffers.get((bucket, place))
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            pinned = torch.cuda.is_available()
            buffer = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
            self._buffers[bucket, place] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _write(self, writer: FileSystemWriterAsync, buckets: list[Any]) -> None:
        began = time.monotonic()
        if buckets:
            with ThreadPoolExecutor(len(buckets)) as pool:
                outcomes = list(
                    pool.map(self._write_file, [writer] * len(buckets), range(len(buckets)), buckets)
                )
            failed = next((found for found in outcomes if isinstance(found, Exception)), None)
            assert writer.results_queue is not None, "a rank that writes reports"
            writer.results_queue.put(dict(enumerate(outcomes)) if failed is None else failed)
        self.seconds = time.monotonic() - began

    def _write_file(self, writer: FileSystemWriterAsync, number: int, bucket: Any) -> Any:
        """Megatron-Core's results for one file, or the exception that it met."""
        results: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(number)
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        try:
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, count, True)
            found = results.get_nowait()[1]
            if not isinstance(found, Exception):
                self.entries[bucket[1]] = entry_of(Path(bucket[0]))
        except Exception as error:
            return error
        if isinstance(found, OSError) and found.filename is None:
            found.filename = str(bucket[0])  # a write to an open file does not say which
        return found
