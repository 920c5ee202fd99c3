"""One rank of `ranks.py`: takes jobs from a pipe until its other end closes.

    job ("run7", world_size 2, pickled (fn, args)) -> process group "run7" -> fn(rank, 2, *args) -> Answer

The groups and global state of a run are destroyed when the next job comes, not when the function returns: by
then every rank has answered, so none loses a peer in the middle of a collective.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import threading
import traceback
from multiprocessing import connection, parent_process
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Answer", "serve"]


class Answer(NamedTuple):
    """What a rank sends back: its pickled result, or as text how it failed."""

    ok: bool
    text: str = ""
    result: bytes = b""


def serve(rank: int, pipe: connection.Connection, store_port: int, stacks: str) -> None:
    """The process's main loop. stacks: the file for the threads' stacks, on SIGUSR1 and on a crash."""
    os.setsid()  # so that all that this rank starts can be killed with it
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        threading.Thread(target=_die_with_caller, daemon=True).start()
        importlib.import_module("anchor_megatron.testing.rank_imports")
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
        while True:
            faulthandler.unregister(signal.SIGUSR1)  # a training loop may have taken the signal
            faulthandler.register(signal.SIGUSR1, file)
            try:
                name, world_size, job = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            pipe.send_bytes(pickle.dumps(_answer(rank, world_size, job, dist.PrefixStore(name, store))))


def _answer(rank: int, world_size: int, job: bytes, store: Any) -> Answer:
    try:
        _clean_up()
        torch.manual_seed(0)
        fn, args = pickle.loads(job)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        return Answer(True, result=pickle.dumps(fn(rank, world_size, *args)))
    except BaseException:  # pytest.fail and SystemExit are not Exceptions
        return Answer(False, f"raised\n{traceback.format_exc()}")


def _clean_up() -> None:
    """Forgets the last run: its process groups, Megatron's global state, the default dtype."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)


def _die_with_caller() -> None:
    """A rank that hangs in a collective must not outlive a caller that was killed."""
    caller = parent_process()
    assert caller is not None, "serve() runs in a process that ranks.py started"
    connection.wait([caller.sentinel])
    os.killpg(0, signal.SIGKILL)
