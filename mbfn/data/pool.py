"""Work in processes, results in order. Small work stays in this process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor


def ordered_map[T, R](work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """`map(work, tasks)` over `workers` processes, 0 for one a core; a mistake in one ends them all."""
    count = min(workers or cores(), len(tasks))
    if count <= 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_alone) as pool:
        try:
            yield from pool.map(work, tasks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _alone() -> None:
    """One core a worker: the tokenizer's own threads would fight over the others."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"
