"""Asking a run to stop: signals become a value that the loop reads between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

REQUEUE = 75  # exit code of a run that was stopped and saved: start the same command again to continue (EX_TEMPFAIL)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def listen() -> Callable[[], int]:
    """Catch SIGTERM, SIGUSR1, SIGHUP and Ctrl-C; the returned function gives the signal that came, 0 while none has.

    Installed before heavy imports, so that no signal is lost. A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    for number in stop_signals():
        signal.signal(number, handle)
    return lambda: received[0] if received else 0


def until(stop: Callable[[], int], deadline: float | None) -> Callable[[], int]:
    """`stop` that gives SIGALRM from `deadline` on, in seconds of the epoch, where nothing came before."""
    if deadline is None:
        return stop
    return lambda: stop() or (int(signal.SIGALRM) if time.time() >= deadline else 0)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that stop a run: those that the caller ignores (SIGHUP under nohup) stay ignored."""
    return tuple(number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
