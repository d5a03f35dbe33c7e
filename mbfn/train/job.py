"""A run as a value that processes hand to each other, and its start. Light to import: torch comes with `run_job`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbfn.config.run import RunConfig
from mbfn.train.pulse import Pulse


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A configuration, where its results go, and the command that asked for it."""

    run: RunConfig
    output_dir: Path
    command: tuple[str, ...] = ()


def run_job(job: Job, stop: Callable[[], int], pulse: Pulse | None = None) -> int:
    """Run this process's rank of the job; the exit code, 0 or `mbfn.train.stop.REQUEUE`."""
    if job.run.bench:
        from mbfn.train.bench import bench

        return bench(job, stop)
    from mbfn.train.session import train

    return train(job, stop, pulse or Pulse())
