"""Distributed functions under plain pytest: processes that run one function after another, ten of them.

    def total(rank, world_size, scale):                      # at module level, so that a rank can import it
        x = torch.tensor([rank * scale])
        dist.all_reduce(x)
        return x

    run_ranks(2, total, 10)      -> [tensor([10]), tensor([10])]
    run_ranks(4, total, 10)      -> two processes are added; the first two are the same as before

What makes a run cheap: torch and Megatron-Core are imported once, in a fork server that every rank is
forked from (so a rank starts in milliseconds and shares its memory), and the default process group is made
anew for each run, over gloo, from one store that the caller serves (milliseconds again). What keeps runs
apart: the process groups and Megatron's global state of a run are destroyed before the next one. A rank
that raises, dies or hangs is an error in the caller that says which rank and where; if one still hangs
then, all ranks are killed.

Ranks see no GPU. What a rank does is in `rank_process.py`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from anchor_megatron.testing.rank_process import Answer, serve

__all__ = ["RankError", "close_ranks", "run_ranks"]

_RUNS = 10  # of a pool: torch does not end the threads of gloo groups that are gone, some 50 a training run
_GRACE_SECONDS = 3.0  # after the first failure: how long the other ranks have to end or fail too


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time. The message holds each such rank's traceback."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` on every rank of a gloo process group, each rank its own process.

    world_size: number of ranks, at least 1. fn: a function at the top level of an importable module. args and
    results travel by pickle. Every run starts with `torch.manual_seed(0)`, FP32 as the default dtype and one
    thread. timeout: seconds, for all ranks together. Returns the results in order of rank. Raises RankError.
    """
    global _pool
    if world_size < 1:
        raise ValueError(f"world_size: got {world_size}, expected at least 1")
    job = pickle.dumps((fn, args))
    if _pool is not None and (not _pool.alive() or _pool.runs >= _RUNS):
        close_ranks()
    if _pool is None:
        _pool = _RankPool()
    try:
        return _pool.run(world_size, job, timeout)
    finally:
        if not _pool.idle:
            close_ranks()


def close_ranks() -> None:
    """Kills every rank; the next `run_ranks` starts new ones. Called at exit."""
    global _pool
    if _pool is not None:
        _pool.kill()
        _pool = None


class _Rank(NamedTuple):
    process: ForkServerProcess
    pipe: connection.Connection
    stacks: Path  # the process writes its threads' stacks here on SIGUSR1 and when it crashes


class _RankPool:
    """Ranks 0, 1, ... of which a run takes the first `world_size`."""

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        self.runs = 0
        self.idle = True  # every rank lives and has answered its last job
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def alive(self) -> bool:
        return all(rank.process.is_alive() for rank in self.ranks)

    def kill(self) -> None:
        for rank in self.ranks:
            _kill_session(rank.process)
            rank.process.join()
            rank.pipe.close()
        self.folder.cleanup()

    def run(self, world_size: int, job: bytes, timeout: float) -> list[Any]:
        while len(self.ranks) < world_size:
            self.ranks.append(self._start_rank(len(self.ranks)))
        self.runs += 1
        self.idle = False
        for rank in self.ranks[:world_size]:
            rank.pipe.send_bytes(pickle.dumps((f"run{self.runs}", world_size, job)))
        answers = self._collect(world_size, timeout)
        missing = [r for r in range(world_size) if r not in answers]
        self.idle = not missing and self.alive()
        if missing or not all(answer.ok for answer in answers.values()):
            reports = [f"rank {r} of {world_size} {a.text}" for r, a in answers.items() if not a.ok]
            hanging = f"of {world_size} did not answer"
            if not reports:
                hanging += f" in {timeout:g} s"
            reports += [f"rank {r} {hanging}; it stands at\n{self._stacks(r)}" for r in missing]
            raise RankError("\n\n".join(reports))
        return [pickle.loads(answers[r].result) for r in range(world_size)]

    def _start_rank(self, rank: int) -> _Rank:
        context = multiprocessing.get_context("forkserver")
        stacks = Path(self.folder.name) / f"rank{rank}.stacks"
        ours, theirs = context.Pipe()
        with _fork_server_settings():
            process = context.Process(
                target=serve, args=(rank, theirs, self.store.port, str(stacks)), name=f"rank{rank}"
            )
            process.start()
        theirs.close()
        return _Rank(process, ours, stacks)

    def _collect(self, world_size: int, timeout: float) -> dict[int, Answer]:
        """Answers by rank, in order of arrival; without the ranks that gave none in time."""
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < world_size:
            waiting = [rank for rank in range(world_size) if rank not in answers]
            pipes = [self.ranks[rank].pipe for rank in waiting]
            ready = connection.wait(pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (rank for rank, pipe in zip(waiting, pipes, strict=True) if pipe in ready):
                answers[rank] = self._receive(rank)
                if not answers[rank].ok:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return answers

    def _receive(self, rank: int) -> Answer:
        try:
            answer = pickle.loads(self.ranks[rank].pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self.ranks[rank].process
            process.join()
            stacks = self.ranks[rank].stacks.read_text()
            return Answer(False, f"died with exit code {process.exitcode}\n{stacks}")
        assert isinstance(answer, Answer), f"rank {rank} sent {type(answer)}"
        return answer

    def _stacks(self, rank: int) -> str:
        """Where the rank's threads stand now."""
        pid = self.ranks[rank].process.pid
        assert pid is not None, f"rank {rank} was never started"
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)  # faulthandler writes in the signal handler; nothing tells us when it has
        return self.ranks[rank].stacks.read_text()


def _kill_session(process: ForkServerProcess) -> None:
    """Kills the rank and all that it started: Megatron's checkpoint writers have a server process each."""
    process.kill()  # by itself too: one that has only just started leads no session yet
    assert process.pid is not None, "a rank in the pool was started"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _fork_server_settings() -> Iterator[None]:
    """For the fork server, which starts with the first rank: what it imports, and that it sees no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    forkserver.set_forkserver_preload(["anchor_megatron.testing.rank_imports"])
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


_pool: _RankPool | None = None
atexit.register(close_ranks)
