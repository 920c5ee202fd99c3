"""The harness of the distributed tests: runs are apart, and no failure hangs or goes unexplained."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from anchor_megatron.testing.ranks import RankError, close_ranks, run_ranks


def total(rank: int, world_size: int, scale: int) -> tuple[Tensor, int]:
    x = torch.tensor([rank * scale])
    dist.all_reduce(x)
    return x, dist.get_world_size()


def process(rank: int, world_size: int) -> int:
    return os.getpid()


def parallel_sizes(rank: int, world_size: int, tensor: int, context: int) -> tuple[int, int, int]:
    from megatron.core import parallel_state as ps

    ps.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
    x = torch.ones(1)
    dist.all_reduce(x, group=ps.get_context_parallel_group())
    return ps.get_tensor_model_parallel_world_size(), int(x), ps.get_data_parallel_world_size()


def leave_traces(rank: int, world_size: int) -> float:
    torch.set_default_dtype(torch.float64)
    return torch.rand(1, dtype=torch.float32).item()


def see_traces(rank: int, world_size: int) -> tuple[torch.dtype, int, float]:
    return torch.get_default_dtype(), torch.get_num_threads(), torch.rand(1).item()


def device_of_cuda(rank: int, world_size: int) -> str:
    return str(torch.zeros(1, device="cuda").device)


def fail_on(rank: int, world_size: int, failing: list[int], wait_for_peers: bool) -> None:
    if rank in failing:
        raise ValueError(f"no luck on {rank}")
    if wait_for_peers:
        dist.barrier()


def start_process(rank: int, world_size: int) -> int:
    return subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid


def sleep_on(rank: int, world_size: int, sleeping: int) -> None:
    if rank == sleeping:
        time.sleep(60)


def die_on(rank: int, world_size: int, dying: int) -> None:
    if rank == dying:
        os.abort()
    dist.barrier()


def test_results_come_back_in_order_of_rank_from_any_world_size() -> None:
    for world_size in (1, 3, 2, 4):
        expected = 10 * sum(range(world_size))
        assert [(int(x), n) for x, n in run_ranks(world_size, total, 10)] == [
            (expected, world_size)
        ] * world_size


@pytest.fixture(autouse=True)
def _ranks_are_new() -> None:
    close_ranks()  # they are replaced every few runs anyway, which is not to happen between two of a test


def test_processes_are_kept_from_run_to_run() -> None:
    three = run_ranks(3, process)
    assert len({*three, os.getpid()}) == 4
    assert run_ranks(2, process) == three[:2]


def test_each_run_has_its_own_parallel_sizes() -> None:
    assert run_ranks(4, parallel_sizes, 2, 2) == [(2, 2, 1)] * 4
    assert run_ranks(4, parallel_sizes, 1, 2) == [(1, 2, 2)] * 4
    assert run_ranks(2, parallel_sizes, 2, 1) == [(2, 1, 1)] * 2


def test_a_run_leaves_no_trace_in_the_next() -> None:
    first = run_ranks(2, leave_traces)
    assert run_ranks(2, see_traces) == [(torch.float32, 1, drawn) for drawn in first]


def test_ranks_take_the_cpu_for_the_device() -> None:
    assert run_ranks(1, device_of_cuda) == ["cpu"]


def test_an_exception_of_every_rank_is_told_and_the_processes_stay() -> None:
    before = run_ranks(2, process)
    with pytest.raises(RankError, match=r"ValueError: no luck on 0") as caught:
        run_ranks(2, fail_on, [0, 1], False)
    assert "ValueError: no luck on 1" in str(caught.value)
    assert "in fail_on" in str(caught.value)
    assert run_ranks(2, process) == before


def test_a_rank_that_waits_for_a_failed_one_is_found_and_replaced() -> None:
    before = run_ranks(2, process)
    with pytest.raises(RankError) as caught:
        run_ranks(2, fail_on, [1], True)
    report = str(caught.value)
    assert report.startswith("rank 1 of 2 raised\n") and "no luck on 1" in report
    assert re.search(r"rank 0 of 2 did not answer; it stands at\n(.|\n)* in fail_on\n", report)
    assert not set(run_ranks(2, process)) & set(before)


def test_a_time_out_names_the_rank_and_where_it_stands() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(3, sleep_on, 2, timeout=1.0)
    report = str(caught.value)
    assert re.search(r"^rank 2 of 3 did not answer in 1 s; it stands at\n(.|\n)* in sleep_on\n", report)
    assert "rank 0" not in report and "rank 1" not in report


def test_a_crash_names_the_rank_and_where_it_was() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 died with exit code -6\n(.|\n)* in die_on\n"):
        run_ranks(2, die_on, 1)
    assert run_ranks(2, total, 1)[0][1] == 2


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="(?i)pickle"):
        run_ranks(1, lambda rank, world_size: None)
    with pytest.raises(ValueError, match="world_size: got 0"):
        run_ranks(0, process)


def test_closing_ends_the_ranks_and_what_they_started() -> None:
    pids = [*run_ranks(2, process), *run_ranks(2, start_process)]
    close_ranks()
    assert ended(pids)
    assert len(run_ranks(1, process)) == 1


def test_ranks_end_with_a_caller_that_was_killed() -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    caller = subprocess.run([sys.executable, "-c", CALLER], env=environment, stdout=subprocess.PIPE)
    assert caller.returncode == -signal.SIGKILL
    assert ended([int(pid) for pid in caller.stdout.split()])


CALLER = """
import os, signal, test_ranks
print(*test_ranks.run_ranks(2, test_ranks.process), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(pids: list[int]) -> bool:
    """True once none of the processes runs; False if one still does after 10 s."""
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
