"""One rank of a Slurm job: `python -m mbfn.launch.slurm_task JOB ATTEMPT`, started by the batch script through srun."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mbfn.train.stop import REQUEUE, listen

if TYPE_CHECKING:
    from mbfn.launch.detect import Rank


def main(job: Path, attempt: Path) -> NoReturn:
    """Run this rank and end with its exit code; a saved stop is 0, because srun ends the others at anything else."""
    stop = listen()  # before everything else: a signal that nobody has asked for ends the process
    from mbfn.errors import LaunchError
    from mbfn.launch.detect import detect
    from mbfn.launch.slurm_files import read_job
    from mbfn.launch.slurm_script import SAVED
    from mbfn.launch.start import start
    from mbfn.launch.worker import redirect

    rank = detect(os.environ)
    if rank is None:
        raise LaunchError("mbfn.launch.slurm_task: no rank of srun; the batch script of launch=slurm starts it")
    if rank.rank:
        redirect(attempt / f"rank_{rank.rank}.log")
    try:
        here = replace(read_job(job), logs=attempt, started=time.time())
        code = start(here, stop, os.environ)
        if code == REQUEUE:
            code = 0
            if rank.rank == 0:
                (attempt / SAVED).touch()
    except BaseException as error:
        code = _note(attempt, rank, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a broken process group can hang


def _note(attempt: Path, rank: Rank, error: BaseException) -> int:
    """Tell the client what ended this rank: by a file, or through Slurm itself where no file can be written."""
    from mbfn.launch.slurm_queue import say
    from mbfn.train.failures import failure_of, note_of, write_failure

    try:
        failure = failure_of(rank.rank, error)
        if not note_of(attempt, rank.rank).is_file():  # with the place in the run
            write_failure(attempt, failure)
    except OSError as unwritable:
        say(f"rank {rank.rank}: {error or type(error).__name__}; {attempt}: {unwritable.strerror}")
        sys.stderr.write(f"error: rank {rank.rank}: {error}\n")
        return 1
    sys.stderr.write(failure.detail or f"error: rank {rank.rank}: {failure.message}\n")
    return failure.exit_code


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
