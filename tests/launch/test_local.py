"""Real local ranks: their ends, their failures, and signals to the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RANKS = 3
LAUNCHER = """
import sys
from pathlib import Path
from mbfn.errors import LaunchError
from mbfn.launch.local import run_local
try:
    stopped = run_local([sys.executable, "-u", sys.argv[1]], int(sys.argv[3]), Path(sys.argv[2]))
except LaunchError as error:
    sys.exit("\\n".join([f"error: {error}", error.detail]).rstrip())
sys.exit(100 + stopped if stopped else 0)
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path
from mbfn.errors import DataError
from mbfn.launch.worker import run_rank
from mbfn.train.stop import listen
logs = Path(sys.argv[0]).parent / "logs"
rank = int(os.environ["RANK"])
stop = listen()
def wait():
    (logs / f"rank_{rank}.ready").write_text(str(os.getpid()))
    while not stop():
        time.sleep(0.02)
    return stop()
def work():
"""


def launch(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Start ranks whose `work` function is `body`."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    (tmp_path / "worker.py").write_text(f"{WORKER}{lines}run_rank(work, logs)\n")
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "worker.py"), str(tmp_path / "logs"), str(RANKS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def ready(tmp_path: Path) -> None:
    """Wait until every rank of `launch` is in its `wait`."""
    end = time.monotonic() + 60
    while len(list((tmp_path / "logs").glob("rank_*.ready"))) < RANKS:
        assert time.monotonic() < end, "ranks did not start"
        time.sleep(0.05)


def test_ranks_know_their_place_and_write_where_they_should(tmp_path: Path) -> None:
    code, out, err = finish(
        launch(tmp_path, "print(rank, os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])\nreturn 0")
    )
    assert (code, out, err) == (0, f"0 {RANKS} 1\n", "")
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").glob("*.log")}
    assert logs == {"rank_0.log": "", "rank_1.log": f"1 {RANKS} 1\n", "rank_2.log": f"2 {RANKS} 1\n"}


def test_the_first_failure_is_the_error_and_ends_the_others(tmp_path: Path) -> None:
    body = "if rank == 2:\n    raise DataError('data.path: gone')\nwait()\nraise RuntimeError('lost a peer')"
    code, _, err = finish(launch(tmp_path, body))
    assert code == 1
    assert err == f"error: rank 2: data.path: gone; logs: {tmp_path}/logs\n"
    assert "data.path: gone" in (tmp_path / "logs" / "rank_2.log").read_text()


def test_an_unforeseen_error_comes_with_its_traceback(tmp_path: Path) -> None:
    code, _, err = finish(launch(tmp_path, "if rank == 1:\n    raise KeyError('weights')\nreturn wait() * 0"))
    assert code == 1
    assert err.startswith(
        f"error: rank 1: KeyError: 'weights'; logs: {tmp_path}/logs\nTraceback (most recent call last)"
    )
    assert err.count("Traceback") == 1


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    body = "if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nwait()\nraise RuntimeError('lost a peer')"
    code, _, err = finish(launch(tmp_path, body))
    assert code == 1
    assert err == f"error: rank 1: ended by SIGKILL; the other ranks were stopped; logs: {tmp_path}/logs\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_and_lets_it_finish(tmp_path: Path, number: signal.Signals) -> None:
    process = launch(tmp_path, "received = wait()\ntime.sleep(0.5)\nprint('saved', received)\nreturn 75")
    ready(tmp_path)
    os.kill(process.pid, number)
    code, out, err = finish(process)
    assert (code, err) == (100 + number, "")
    assert out == f"saved {int(number)}\n"
    for rank in range(1, RANKS):
        assert (tmp_path / "logs" / f"rank_{rank}.log").read_text() == f"saved {int(number)}\n"


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    process = launch(tmp_path, "return wait() * 0")
    ready(tmp_path)
    ranks = [psutil.Process(int(path.read_text())) for path in (tmp_path / "logs").glob("rank_*.ready")]
    process.kill()
    process.communicate(timeout=30)
    gone, alive = psutil.wait_procs(ranks, timeout=30)
    assert len(gone) == RANKS
    assert not alive
