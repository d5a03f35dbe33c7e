"""One local rank: `python -m mbfn.launch.worker JOB`, with the job as a pickled value: nothing is composed again."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mbfn.train.failures import failure_of, note_of, write_failure
from mbfn.train.job import run_job
from mbfn.train.pulse import Pulse, pulse_of
from mbfn.train.stop import REQUEUE, listen

SAVED = "saved"  # the file among the logs that says: state saved, start again
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_rank(work: Callable[[], int], logs: Path) -> NoReturn:
    """End this process with the exit code of `work`, its failure noted for the launcher if there is one.

    Rank 0 writes to the terminal what it prints, its errors to `logs/rank_0.log`; rank N writes both to its log.
    """
    rank = int(os.environ["RANK"])
    _end_with_launcher()
    redirect(logs / f"rank_{rank}.log", output=rank > 0)
    faulthandler.enable()
    try:
        code = work()
    except BaseException as error:
        failure = failure_of(rank, error)
        if not note_of(logs, rank).is_file():  # with the place in the run
            write_failure(logs, failure)
        sys.stderr.write(failure.detail or f"{failure.message}\n")
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a broken process group can hang


def _end_with_launcher() -> None:
    """Have the kernel kill this process should the launcher die without a word: ranks left behind would write on."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def redirect(log: Path, *, output: bool = True) -> None:
    """Send the errors of this process to `log`, with `output` all that it prints; native libraries included."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
        if output:
            os.dup2(file.fileno(), 1)


def _main(task: str) -> NoReturn:
    stop = listen()
    job = pickle.loads(Path(task).read_bytes())
    pulse = Pulse(pulse_of(job.notes, int(os.environ["RANK"])))

    def work() -> int:
        if run_job(job, stop, pulse) == REQUEUE:
            (job.notes / SAVED).touch()  # an exit code of its own would have the launcher end the other ranks
        return 0

    run_rank(work, job.notes)


if __name__ == "__main__":
    _main(sys.argv[1])
