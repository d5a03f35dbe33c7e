"""What a submission leaves beside a run: the frozen job, and which job of the cluster has it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mbfn.config.build import build
from mbfn.config.run import RunConfig
from mbfn.config.schema import to_dict
from mbfn.errors import LaunchError
from mbfn.train.job import Job

DIRECTORY = "slurm"  # in an output directory
_RECORD = "submitted.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The job of the cluster that has a run: its id, `12` or `12_3`, and the file that it prints to."""

    job_id: str
    log: str


def job_text(job: Job) -> str:
    """The job as the text that its ranks read; `job_from_text` is the inverse."""
    tree = {"run": to_dict(job.run), "output_dir": str(job.output_dir), "command": list(job.command)}
    return json.dumps(tree, indent=1) + "\n"


def job_from_text(text: str) -> Job:
    """The job of `job_text`. Nothing is composed: no file of the configuration is read."""
    tree = json.loads(text)
    run = build(RunConfig, tree["run"])
    return Job(run=run, output_dir=Path(tree["output_dir"]), command=tuple(tree["command"]))


def job_file(job: Job) -> Path:
    """Where the job's text goes: the name holds its digest, so a batch script that names it says what will run."""
    digest = hashlib.sha256(job_text(job).encode()).hexdigest()[:16]
    return job.output_dir / DIRECTORY / f"job_{digest}.json"


def write_job(job: Job) -> Path:
    """Leave the job where `job_file` says."""
    path = job_file(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, job_text(job))
    return path


def read_job(path: Path) -> Job:
    """The job as it was submitted.

    Raises: LaunchError where the file is gone or is not what was submitted.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise LaunchError(f"{path}: the submitted job cannot be read ({error.strerror}); submit it again") from error
    if path.stem != f"job_{hashlib.sha256(text.encode()).hexdigest()[:16]}":
        raise LaunchError(f"{path}: was changed after it was submitted; submit the run again")
    return job_from_text(text)


def write_submission(output_dir: Path, submission: Submission) -> None:
    """Note which job has the run of `output_dir`."""
    _write(output_dir / DIRECTORY / _RECORD, json.dumps(asdict(submission)) + "\n")


def read_submission(output_dir: Path) -> Submission | None:
    """Which job has, or had, the run; none when it was never submitted."""
    try:
        return Submission(**json.loads((output_dir / DIRECTORY / _RECORD).read_text()))
    except FileNotFoundError:
        return None


def submitted_job(output_dir: Path) -> Job | None:
    """The job that was submitted last into `output_dir`; none when there is none."""
    files = sorted((output_dir / DIRECTORY).glob("job_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return read_job(files[-1]) if files else None


def attempts(output_dir: Path, job_id: str | None = None) -> list[Path]:
    """The directories of every start of a job, `<job>_<restart>`, in order; of all jobs where none is given."""
    found = [path for path in (output_dir / DIRECTORY).glob("*_*") if path.is_dir()]
    numbered = [(tuple(map(int, path.name.split("_"))), path) for path in found]
    return [path for _, path in sorted(numbered) if job_id is None or path.name.split("_")[0] == job_id]


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
