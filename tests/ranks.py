"""Real ranks for tests: forked processes that share the parent's imports and talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


class RankError(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120, **kwargs: Any) -> list[Any]:
    """`function(*args, **kwargs)` on each of `size` ranks, by the environment of a launcher; its results in rank order.

    Raises: RankError with the tracebacks of the ranks that failed within a second of the first; the rest are killed.
    """
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that did not survive the fork
    context = multiprocessing.get_context("fork")
    port, call = _free_port(), partial(function, *args, **kwargs)
    pipes, processes = [], []
    for rank in range(size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, port, send, call), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(rank: int, size: int, port: int, send: Connection, call: Callable[[], Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # renews the pool that the fork broke, before two threads do it at once and one finds none
    try:
        reply = pickle.dumps((True, call()))
    except BaseException:
        reply = pickle.dumps((False, traceback.format_exc()))
    send.send_bytes(reply)
    send.close()
    os._exit(0)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    while waiting := [pipe for rank, pipe in enumerate(pipes) if rank not in results]:
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = f"ranks {[pipes.index(pipe) for pipe in waiting]} did not finish in time"
            raise RankError("\n".join(failures) or late)
        for pipe in ready:
            rank = pipes.index(pipe)
            done, results[rank] = _reply(pipe)
            if not done:
                failures.append(f"rank {rank} failed:\n{results[rank]}")
                # Others lose their connection to the one that failed first: which reports first is chance.
                deadline = min(deadline, time.monotonic() + 1)
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _reply(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "died without a word"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
