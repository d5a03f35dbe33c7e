"""Batches made on a thread while the step runs, so that the step does not wait for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

_DEPTH = 2


def prefetched[T](items: Iterable[T], depth: int = _DEPTH) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made ahead; their errors come where they would have."""
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=depth)
    left = threading.Event()

    def put(item: tuple[bool, T | BaseException | None]) -> None:
        while not left.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if left.is_set():
                    return
            put((False, None))
        except BaseException as error:  # handed to the consumer, whose business it is
            put((False, error))

    thread = threading.Thread(target=work, name="mbfn-loader", daemon=True)
    thread.start()
    try:
        while (got := ready.get())[0]:
            yield got[1]  # type: ignore[misc]
        if got[1] is not None:
            raise got[1]  # type: ignore[misc]
    finally:
        left.set()
        thread.join()
