"""The one way into a run: in this process, on local ranks, as a rank of torchrun or srun, or as a job of Slurm."""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path

from mbfn.data import open_dataset
from mbfn.errors import LaunchError
from mbfn.launch.check import check_launch
from mbfn.launch.detect import Rank, detect, local_gpus, rank_environment
from mbfn.launch.worker import SAVED
from mbfn.train.checkpoints import checkpoint_to_resume
from mbfn.train.events import note_event
from mbfn.train.job import Job, run_job
from mbfn.train.stop import REQUEUE


def start(job: Job, stop: Callable[[], int], env: MutableMapping[str, str]) -> int:
    """Run `job` as its launch group and the environment say; the exit code.

    Raises: LaunchError or DataError before torch is imported, where the run cannot work here.
    """
    rank = detect(env)
    if rank is None and job.run.launch.kind == "slurm":
        from mbfn.launch.slurm import start_slurm

        return start_slurm(job, stop)
    check_launch(job.run, rank, local_gpus(env))
    if rank is not None:
        env.update(rank_environment(rank, env))
        return _joined(job, stop, rank)
    if job.run.parallel.world_size == 1 and not job.run.launch.max_restarts:
        return run_job(job, stop)
    return _local(job, stop)


def _joined(job: Job, stop: Callable[[], int], rank: Rank) -> int:
    if rank.launcher == "srun":
        return run_job(job, stop)
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(run_job)(job, stop) or 0  # torchrun shows what `record` notes as the root cause


def _local(job: Job, stop: Callable[[], int]) -> int:
    from mbfn.launch.local import run_local

    if not job.run.bench:
        open_dataset(job.run)  # mistakes in the data show here once, and ranks find it tokenised
    root = job.output_dir / "checkpoints"
    checkpoint_to_resume(job.run, root)
    if stop():
        return 128 + stop()
    with tempfile.TemporaryDirectory(prefix="mbfn-job-") as scratch:
        task = Path(scratch) / "job.pickle"
        task.write_bytes(pickle.dumps(job))
        command = (sys.executable, "-u", "-m", "mbfn.launch.worker", str(task))
        stopped_by = _started_again(job, lambda: run_local(command, job.run.parallel.world_size, job.notes))
    if (job.notes / SAVED).exists():
        return REQUEUE
    return 128 + stopped_by if stopped_by is not None else 0


def _started_again(job: Job, run: Callable[[], int | None]) -> int | None:
    """What `run` gives, started anew after failures as often as the job may be; its ranks go on from a checkpoint."""
    most = job.run.launch.max_restarts
    for start in range(2, most + 2):
        (job.notes / SAVED).unlink(missing_ok=True)
        try:
            return run()
        except LaunchError as error:
            if error.known:
                raise
            sys.stderr.write(f"error: {error}; start {start} of {most + 1}\n{error.detail}")
            note_event(job.output_dir, {"event": "failure", "error": str(error), "start": start})
    (job.notes / SAVED).unlink(missing_ok=True)
    return run()
