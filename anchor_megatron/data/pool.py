"""Batches through worker processes: results in the order of the batches, however many workers there are.

    workers 2, batches a b c d:   worker 0   a . c      encoded(...) yields  A B C D
                                  worker 1   b d

No more than a few batches a worker are read ahead, so memory stays bounded. One worker is this process, where
the tokenizer may use threads of its own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from anchor_megatron.data.encode import Batch, Encoded, Encoder

__all__ = ["encoded"]

_AHEAD = 4  # batches a worker

MakeEncoder = Callable[[], Encoder]
_encoder: Encoder | None = None


def encoded(make_encoder: MakeEncoder, batches: Iterator[Batch], *, workers: int) -> Iterator[Encoded]:
    """What the encoder makes of each batch, in order. `make_encoder` is called once a worker and is pickled
    on its way there.

    An exception of an encoder is raised here; a worker that dies is concurrent.futures' BrokenProcessPool.
    """
    if workers == 1:
        yield from map(make_encoder(), batches)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(make_encoder,)
    )
    try:
        waiting: deque[Future[Encoded]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make_encoder: MakeEncoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    global _encoder
    _encoder = make_encoder()


def _encode(batch: Batch) -> Encoded:
    assert _encoder is not None, "the pool starts a worker before it sends batches"
    return _encoder(batch)
