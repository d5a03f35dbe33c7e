"""A run as a value that processes hand to each other, and its start. Light to import: torch comes with `run_job`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mbfn.config.run import RunConfig
from mbfn.train.pulse import Pulse
from mbfn.train.stop import until


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A configuration, where its results go, and the command that asked for it."""

    run: RunConfig
    output_dir: Path
    command: tuple[str, ...] = ()
    logs: Path | None = None  # of its ranks; none: in the output directory
    started: float = field(default_factory=time.time, compare=False)  # this start of the job, seconds of the epoch

    @property
    def notes(self) -> Path:
        """Where ranks write their logs and note their failures."""
        return self.logs or self.output_dir / "logs"


def run_job(job: Job, stop: Callable[[], int], pulse: Pulse | None = None) -> int:
    """Run this process's rank of the job; the exit code, 0 or `mbfn.train.stop.REQUEUE`."""
    if job.run.bench:
        from mbfn.train.bench import bench

        return bench(job, stop)
    from mbfn.train.session import train

    limit = 60 * job.run.launch.stop_after_min
    return train(job, until(stop, job.started + limit if limit else None), pulse or Pulse())
