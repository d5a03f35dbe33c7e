"""`launch=slurm`: one run as a job of a Slurm cluster, from the frozen configuration to the job's end."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mbfn.errors import LaunchError
from mbfn.launch.slurm_files import DIRECTORY, Submission, job_file, read_submission, write_job, write_submission
from mbfn.launch.slurm_queue import JobState, job_states, submit
from mbfn.launch.slurm_script import Batch, Entry, batch_script
from mbfn.launch.slurm_watch import describe, end_of, follow, wait
from mbfn.train.job import Job


def start_slurm(job: Job, stop: Callable[[], int]) -> int:
    """Submit `job`, wait for its end unless it is to be detached; the exit code.

    Raises: LaunchError where it cannot be submitted, or with what ended it.
    """
    launch = job.run.launch
    frozen = frozen_job(job)
    log = frozen.output_dir / DIRECTORY / "%j.log"
    script = batch_script(make_batch((frozen,), log=log))
    if launch.dry_run:
        sys.stdout.write(script)
        return 0
    refuse_active(frozen)
    submission = _submit(frozen, script, log)
    print(f"job {submission.job_id} submitted; results: {frozen.output_dir}", flush=True)
    return 0 if launch.detach else _watch(frozen, submission, stop)


def frozen_job(job: Job) -> Job:
    """The job as the cluster gets it: paths absolute, and nothing of how its client behaves.

    Raises: LaunchError where a second start of the job could not go on.
    """
    if job.run.launch.max_requeues and job.run.checkpoint.resume == "never":
        raise LaunchError(
            f"checkpoint.resume: never, but launch.max_requeues={job.run.launch.max_requeues} starts the job again "
            "from its checkpoint; set checkpoint.resume=auto or launch.max_requeues=0"
        )
    launch = replace(job.run.launch, kind="slurm", dry_run=False, detach=False)
    command = tuple(part for part in job.command if not re.match(r"\+*launch\.(dry_run|detach)=", part))
    return Job(run=replace(job.run, launch=launch), output_dir=job.output_dir.absolute(), command=command)


def make_batch(jobs: tuple[Job, ...], *, log: Path, parallel_runs: int = 0) -> Batch:
    """The batch of `frozen_job`s that share nodes, limits and site."""
    site = jobs[0].run.site
    return Batch(
        run=jobs[0].run,
        entries=tuple(Entry(output_dir=job.output_dir, job_file=job_file(job)) for job in jobs),
        log=log,
        cwd=Path.cwd(),
        python=site.python or ("python" if site.container_image else sys.executable),
        parallel_runs=parallel_runs,
    )


def active_job(output_dir: Path) -> JobState | None:
    """The job that has the run of `output_dir` now, waiting or running."""
    submission = read_submission(output_dir)
    if submission is None:
        return None
    state = job_states([submission.job_id])[submission.job_id]
    return state if state.active else None


def refuse_active(job: Job) -> None:
    """Do not start a run twice.

    Raises: LaunchError where a job has it, and this one does not wait for that one.
    """
    state = active_job(job.output_dir)
    if state is not None and state.job_id not in re.split(r"[:,?]", job.run.launch.dependency):
        raise LaunchError(
            f"hydra.run.dir: {job.output_dir} has {describe(state)}; wait, `scancel {state.job_id}`, choose another "
            f"directory, or line up behind it with launch.dependency=afterany:{state.job_id}"
        )


def _submit(job: Job, script: str, log: Path) -> Submission:
    write_job(job)
    job_id = submit(script)
    submission = Submission(job_id=job_id, log=str(log).replace("%j", job_id))
    write_submission(job.output_dir, submission)
    return submission


def _watch(job: Job, submission: Submission, stop: Callable[[], int]) -> int:
    log = Path(submission.log)
    lines = follow(log)
    states = wait(
        {job.output_dir: submission},
        poll_s=job.run.launch.poll_s,
        stop=stop,
        changed=lambda _, state: print(describe(state), flush=True),
        meanwhile=lambda: next(lines),
    )
    if states is None:
        here = os.path.relpath(job.output_dir)
        print(f"job {submission.job_id} goes on; `python -m mbfn.status {here}` looks at it")
        return 128 + stop()
    end = end_of(states[job.output_dir], job, log)
    sys.stdout.flush()
    if end.code == 1:
        raise LaunchError(end.text, end.detail)
    if end.code:
        print(end.text)
    return end.code
