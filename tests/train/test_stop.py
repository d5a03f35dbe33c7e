"""Signals become a value."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal, sys
from mbfn.train.stop import listen
stop = listen()
seen = [stop()]
for name in sys.argv[1].split():
    os.kill(os.getpid(), getattr(signal, name))
    seen.append(stop())
print(seen)
"""


def outcome(signals: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, signals], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_the_first_signal_is_kept() -> None:
    assert outcome("SIGTERM SIGUSR1") == (0, "[0, 15, 15]\n")
    assert outcome("SIGINT SIGTERM") == (0, "[0, 2, 2]\n")
    assert outcome("SIGHUP") == (0, "[0, 1]\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    command = ["nohup", sys.executable, "-c", PROGRAM, "SIGHUP SIGUSR1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[0, 0, 10]\n")


def test_a_second_interrupt_does_not_wait() -> None:
    code, out = outcome("SIGINT SIGINT")
    assert code != 0
    assert out == ""
