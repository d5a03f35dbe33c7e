"""The runs of a sweep as job arrays: each run once, addressed by its output directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbfn.errors import LaunchError
from mbfn.launch.results import finished, result
from mbfn.launch.slurm import active_job, frozen_job, make_batch
from mbfn.launch.slurm_files import DIRECTORY, Submission, read_submission, write_job, write_submission
from mbfn.launch.slurm_queue import JobState, submit
from mbfn.launch.slurm_script import batch_script, nodes_of
from mbfn.launch.slurm_watch import describe, end_of, wait
from mbfn.train.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """Runs that need the same nodes, and the script that starts them."""

    jobs: tuple[Job, ...]
    log: Path
    script: str


def run_sweep(jobs: Sequence[Job], *, sweep_dir: Path, parallel_runs: int) -> list[float | None]:
    """Submit what is neither done nor in the queue, wait for all unless detached; the result of each job, in order.

    Raises: LaunchError with a line for every run that did not end well.
    """
    launch = jobs[0].run.launch
    frozen = {job.output_dir: job for job in map(frozen_job, jobs)}
    labels = _labels(list(frozen.values()))
    idle = [job for job in frozen.values() if not finished(job.run, job.output_dir)]
    active = [job for job in idle if active_job(job.output_dir)]
    arrays = _arrays([job for job in idle if job not in active], sweep_dir.absolute(), parallel_runs)
    if launch.dry_run:
        sys.stdout.write("\n".join(array.script for array in arrays))
        return [None for _ in jobs]
    done = len(frozen) - len(idle)
    print(
        f"{len(frozen)} runs: {done} done, {len(active)} in the queue, {len(idle) - len(active)} to submit", flush=True
    )
    for array in arrays:
        print(f"job {_submit(array)} submitted: {len(array.jobs)} runs; results: {sweep_dir}", flush=True)
    if not launch.detach:
        _watch({job.output_dir: job for job in idle}, labels, launch.poll_s, sweep_dir)
    return [result(job.output_dir) for job in jobs]


def _arrays(jobs: Sequence[Job], sweep_dir: Path, parallel_runs: int) -> list[Array]:
    """One array for the runs that agree in nodes, limits and site."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault((nodes_of(job.run), job.run.launch, job.run.site), []).append(job)
    log = sweep_dir / DIRECTORY / "%A_%a.log"
    return [
        Array(
            jobs=tuple(group),
            log=log,
            script=batch_script(make_batch(tuple(group), log=log, parallel_runs=min(parallel_runs, len(group)))),
        )
        for group in groups.values()
    ]


def _submit(array: Array) -> str:
    array.log.parent.mkdir(parents=True, exist_ok=True)
    for job in array.jobs:
        write_job(job)
    number = submit(array.script)
    for task, job in enumerate(array.jobs):
        log = str(array.log).replace("%A", number).replace("%a", str(task))
        write_submission(job.output_dir, Submission(job_id=f"{number}_{task}", log=log))
    return number


def _watch(jobs: Mapping[Path, Job], labels: Mapping[Path, str], poll_s: float, sweep_dir: Path) -> None:
    submissions = {path: submission for path in jobs if (submission := read_submission(path))}

    def changed(path: Path, state: JobState) -> None:
        print(f"{labels[path]}: {describe(state)}", flush=True)

    try:
        states = wait(submissions, poll_s=poll_s, stop=lambda: 0, changed=changed) or {}
    except KeyboardInterrupt:
        print(f"the jobs go on; `python -m mbfn.status {sweep_dir}` looks at them")
        raise
    ends = {path: end_of(state, jobs[path], Path(submissions[path].log)) for path, state in states.items()}
    failed = {path: end for path, end in ends.items() if end.code}
    sys.stderr.write("".join(f"{labels[path]}:\n{end.detail}" for path, end in failed.items() if end.detail))
    if failed:
        lines = [f"{labels[path]}: {end.text}" for path, end in failed.items()]
        raise LaunchError("\n".join([*lines, f"{len(failed)} of {len(jobs)} runs did not end well"]))


def _labels(jobs: Sequence[Job]) -> dict[Path, str]:
    """What tells a run from the others of the sweep: its own overrides."""
    common = set.intersection(*(set(job.command) for job in jobs))
    own = {job.output_dir: " ".join(part.lstrip("+") for part in job.command if part not in common) for job in jobs}
    return {path: text or path.name for path, text in own.items()}
