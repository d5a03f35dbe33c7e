"""What became of runs, read from their output directories and from the cluster: without torch, from any machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mbfn.config.build import build
from mbfn.config.run import RunConfig
from mbfn.config.schema import to_dict
from mbfn.launch.results import finished
from mbfn.launch.slurm_files import DIRECTORY, read_submission, submitted_job
from mbfn.launch.slurm_queue import JobState, job_states
from mbfn.launch.slurm_watch import end_of
from mbfn.train.checkpoints import complete_checkpoints
from mbfn.train.failures import first_failure
from mbfn.train.job import Job
from mbfn.train.record import Record, read_records

_INSIDE = {"checkpoints", "hf", "logs", DIRECTORY, ".hydra"}  # of a run; no run lies in one of these
_WHERE = ("launch.", "site.", "data.cache", "log.")  # fields that say nothing about the results
State = Literal["done", "running", "pending", "failed", "stopped", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run: how far it is, and why it is no further."""

    path: Path
    run: RunConfig
    state: State
    job_id: str
    records: tuple[Record, ...]
    note: str  # the last error line, or what the job waits for

    @property
    def step(self) -> int:
        """The last recorded step."""
        return int(self.records[-1]["step"] or 0) if self.records else 0

    @property
    def loss(self) -> float | None:
        """The training loss of the last recorded step."""
        return self.records[-1]["loss"] if self.records else None

    @property
    def valid_loss(self) -> float | None:
        """The last held-out loss."""
        return next((r["valid_loss"] for r in reversed(self.records) if r.get("valid_loss") is not None), None)

    @property
    def rank_by(self) -> float:
        """The held-out loss where there is one, else the training loss; infinite where there is neither."""
        loss = self.loss if self.valid_loss is None else self.valid_loss
        return float("inf") if loss is None else loss


def find_runs(root: Path) -> list[Path]:
    """Every output directory at or under `root`, in order of name."""
    return sorted(_walk(root))


def statuses(paths: Sequence[Path]) -> list[RunStatus]:
    """The state of each run; the cluster is asked once for all."""
    submissions = {path: read_submission(path) for path in paths}
    jobs = job_states([submission.job_id for submission in submissions.values() if submission])
    return [_status(path, jobs.get(s.job_id) if (s := submissions[path]) else None) for path in paths]


def differing(runs: Sequence[RunConfig]) -> dict[str, list[Any]]:
    """Field path -> its value in each run, for the fields in which runs differ and that matter to the results."""
    flat = [dict(_leaves(to_dict(run))) for run in runs]
    names = [name for name in (flat[0] if flat else {}) if not name.startswith(_WHERE)]
    return {name: [one.get(name) for one in flat] for name in names if len({repr(one.get(name)) for one in flat}) > 1}


def _walk(root: Path) -> Iterator[Path]:
    for directory, inside, files in os.walk(root):
        place = Path(directory)
        if {"config.yaml", "run.json"} <= set(files) or (place / DIRECTORY / "submitted.json").exists():
            yield place
        inside[:] = [name for name in inside if name not in _INSIDE]


def _status(path: Path, job: JobState | None) -> RunStatus:
    run = _run_of(path)
    state, note = _state(run, path, job)
    records = tuple(read_records(path / "metrics.jsonl"))
    return RunStatus(path=path, run=run, state=state, job_id=job.job_id if job else "", records=records, note=note)


def _state(run: RunConfig, path: Path, job: JobState | None) -> tuple[State, str]:
    if finished(run, path):
        return "done", ""
    if job is not None and job.active:
        if job.state == "PENDING":
            return "pending", job.reason
        return "running", "" if job.state == "RUNNING" else job.state
    submission = read_submission(path)
    if job is not None and submission is not None:
        end = end_of(job, Job(run=run, output_dir=path), Path(submission.log))
        return ("failed" if end.code == 1 else "stopped"), end.text
    if failure := first_failure(path / "logs"):
        return "failed", failure.line
    return ("stopped" if complete_checkpoints(path / "checkpoints") else "unfinished"), ""


def _run_of(path: Path) -> RunConfig:
    job = submitted_job(path)
    if job is not None:
        return job.run
    import yaml

    return build(RunConfig, yaml.safe_load((path / "config.yaml").read_text()))


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _leaves(value, where)
        else:
            yield where, value
