"""One local rank: `python -m mbfn.launch.worker JOB`, with the job as a pickled value: nothing is composed again."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mbfn.launch.failures import write_failure
from mbfn.train.job import run_job
from mbfn.train.stop import listen

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_rank(work: Callable[[], int], logs: Path) -> NoReturn:
    """End this process with the exit code of `work`, its failure noted for the launcher if there is one.

    Rank 0 writes to the terminal, every other one to `logs/rank_N.log`.
    """
    rank = int(os.environ["RANK"])
    _end_with_launcher()
    if rank:
        redirect(logs / f"rank_{rank}.log")
    try:
        code = work()
    except BaseException as error:
        failure = write_failure(logs, rank, error)
        sys.stderr.write((failure.detail or f"{failure.message}\n") if rank else "")
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a broken process group can hang


def _end_with_launcher() -> None:
    """Have the kernel kill this process should the launcher die without a word: ranks left behind would write on."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def redirect(log: Path) -> None:
    """Send what this process prints, native libraries included, to `log`."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _main(task: str) -> NoReturn:
    stop = listen()
    job = pickle.loads(Path(task).read_bytes())
    run_rank(lambda: run_job(job, stop), job.output_dir / "logs")


if __name__ == "__main__":
    _main(sys.argv[1])
