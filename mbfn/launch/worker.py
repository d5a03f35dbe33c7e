"""One local rank: `python -m mbfn.launch.worker JOB`, started by `run_local` with the job as a pickled value."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from mbfn.launch.failures import write_failure
from mbfn.train.stop import listen


def main(task: str) -> None:
    """Run the job of this rank and end the process, with the failure noted for the launcher if there is one."""
    stop = listen()
    rank = int(os.environ["RANK"])
    job = pickle.loads(Path(task).read_bytes())
    logs = job.output_dir / "logs"
    if rank:
        _redirect(logs / f"rank_{rank}.log")
    try:
        from mbfn.train.job import run_job

        code = run_job(job, stop)
    except BaseException as error:
        failure = write_failure(logs, rank, error)
        sys.stderr.write((failure.detail or f"{failure.message}\n") if rank else "")
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a broken process group can hang


def _redirect(log: Path) -> None:
    """Send what this process prints, native libraries included, to `log`."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


if __name__ == "__main__":
    main(sys.argv[1])
