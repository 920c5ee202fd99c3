"""An error as the person who has to act on it needs it: who, when, what, and what to do.

rank 3, step 120, computing: RuntimeError: Connection closed by peer [10.0.0.7]:4711
    Another rank died or was cut off: look for its message. The same command goes on from step 100.
"""

from __future__ import annotations

import torch

from anchor_megatron.training.checkpoint import SaveFailed
from anchor_megatron.training.health import Diverged

__all__ = ["explain"]

_COMMUNICATION = ("Connection closed", "Connection reset", "Timed out", "NCCL", "Gloo", "gloo", "Broken pipe")


def explain(error: BaseException, *, rank: int, step: int, phase: str, saved: int | None) -> str:
    """`error` with rank, step and what the run was doing, and the action to take.

    saved: step of the newest checkpoint; None where there is none.
    """
    again = "starts over" if saved is None else f"goes on from step {saved}"
    what = f"rank {rank}, step {step}, {phase}: {type(error).__name__}: {error}"
    return f"{what}\n    {_action(error)} The same command {again}."


def _action(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, SaveFailed):
        return "Make room or mend the disk, or set another checkpoint.directory."
    if isinstance(error, Diverged):
        return "Look at the documents written out; lower optimizer.lr or leave them out of the data."
    if "Bus error" in text:  # of a loader's process, which torch takes for shared memory alone
        return "A data file was cut off, its disk failed, or /dev/shm is full."
    if isinstance(error, torch.OutOfMemoryError):
        return "Set train.recompute, or raise parallel.context or parallel.tensor."
    if isinstance(error, (torch.distributed.DistError, RuntimeError)) and any(
        w in text for w in _COMMUNICATION
    ):
        return "Another rank died, hangs or was cut off: look for its message."
    if isinstance(error, (OSError, ValueError)):
        return "Restore the file that the message names."
    return "If it comes again at this step, report it with the lines above."
