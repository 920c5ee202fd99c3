"""Which windows a rank reads: step s takes windows [s * global_batch_size, (s+1) * global_batch_size)
whatever the layout.

Global batch 8, micro-batch 2, two replicas; step 0:

    micro-batch       0      1
    replica 0        0 1    4 5
    replica 1        2 3    6 7
"""

from __future__ import annotations

__all__ = ["window_indices"]


def window_indices(
    step: int,
    micro_batch: int,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    micro_batch_size: int,
    global_batch_size: int,
) -> range:
    """Windows of one replica's micro-batch; steps and micro-batches count from 0."""
    first = (micro_batch * data_parallel_size + data_parallel_rank) * micro_batch_size
    assert first + micro_batch_size <= global_batch_size, (
        f"micro-batch {micro_batch} of replica {data_parallel_rank}: not in a batch of {global_batch_size}"
    )
    begin = step * global_batch_size + first
    return range(begin, begin + micro_batch_size)
