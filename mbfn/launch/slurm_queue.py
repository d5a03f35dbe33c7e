"""Slurm's commands: submit a script, ask for the state of jobs. No accounting is needed; it is asked where it is."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mbfn.errors import LaunchError

_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "RECONFIG_FAIL",
    "REVOKED",
    "TIMEOUT",
}
_TIMEOUT_S = 60
LOST = "UNKNOWN"  # the state of a job that the cluster has forgotten
SILENT = "UNREACHABLE"  # and of one that the cluster was asked about without an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the cluster says of a job. `job_id` is `12` or `12_3`, `raw_id` the one that the job itself sees."""

    job_id: str
    raw_id: str
    state: str
    reason: str = ""
    exit_code: str = ""
    restarts: int = 0
    nodes: str = ""
    comment: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self.state in _OVER or self.state == LOST

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return not self.over


def submit(script: str) -> str:
    """Put a batch script into the queue; the id of its job.

    Raises: LaunchError with sbatch's own sentence.
    """
    return _slurm(["sbatch", "--parsable"], script).strip().partition(";")[0]


def job_states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """The state of each job, `LOST` for those that nobody knows any more."""
    known: dict[str, JobState] = {}
    silent: set[str] = set()
    for number in sorted({job_id.partition("_")[0] for job_id in job_ids}):
        shown = _shown(number)
        silent |= {number} if shown is None else set()
        known |= {state.job_id: state for state in shown or _accounted(number)}
    return {
        job_id: known.get(job_id)
        or JobState(job_id=job_id, raw_id=job_id, state=SILENT if job_id.partition("_")[0] in silent else LOST)
        for job_id in job_ids
    }


def parse_job(line: str) -> list[JobState]:
    """The states in one line of `scontrol -o show job`; several for array tasks that still wait together."""
    fields = dict(re.findall(r"(?:^| )([A-Z][A-Za-z:/]*)=(.*?)(?= [A-Z][A-Za-z:/]*=|$)", line.strip()))
    array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId")
    names = [fields["JobId"]] if array is None else [f"{array}_{number}" for number in _tasks(task or "")]
    return [
        JobState(
            job_id=name,
            raw_id=fields["JobId"],
            state=fields["JobState"].split(",")[0],
            reason=_value(fields.get("Reason")),
            exit_code=fields.get("ExitCode", ""),
            restarts=int(fields.get("Restarts", "0")),
            nodes=_value(fields.get("NodeList")),
            comment=_value(fields.get("Comment")),
        )
        for name in names
    ]


def down_nodes(nodes: str) -> list[str]:
    """Those of `nodes` that are down, with the reason that an administrator or Slurm gave."""
    if not nodes:
        return []
    found = []
    for line in _ask(["scontrol", "-o", "show", "node", nodes]).splitlines():
        name, state = (re.search(rf"\b{field}=(\S+)", line) for field in ("NodeName", "State"))
        reason = re.search(r"\bReason=(.*?)(?= \[|$)", line)
        if name and state and re.match(r"DOWN|FAIL|NOT_RESPONDING", state[1]):
            found.append(f"{name[1]} is {state[1]}" + (f" ({reason[1]})" if reason else ""))
    return found


def say(text: str) -> None:
    """Leave a line with the cluster for whoever asks for this job; nothing where that is impossible."""
    job = os.environ.get("SLURM_JOB_ID", "")
    _ask(["scontrol", "update", f"JobId={job}", f"Comment={text[:1000]}"])


def _shown(number: str) -> list[JobState] | None:
    """What the controller holds; nothing of a job that it has forgotten, none where it does not answer."""
    done = _call(["scontrol", "-o", "show", "job", number])
    if done is None or (done.returncode and "Invalid job id" in done.stderr):
        return []
    if done.returncode:
        return None
    lines = done.stdout.splitlines()
    return [state for line in lines if line.startswith("JobId=") for state in parse_job(line)]


def _accounted(number: str) -> list[JobState]:
    fields = "JobID,JobIDRaw,State,ExitCode"
    lines = _ask(["sacct", "-X", "-n", "-P", "-j", number, "-o", fields]).splitlines()
    rows = [line.split("|") for line in lines if line.count("|") == 3]
    return [JobState(job_id=a, raw_id=b, state=state.split()[0], exit_code=code) for a, b, state, code in rows]


def _tasks(text: str) -> list[int]:
    """`0-2,5%4` -> 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def _value(text: str | None) -> str:
    return "" if text is None or text in ("None", "(null)") else text


def _slurm(command: list[str], text: str) -> str:
    # A variable of an outer job would be taken for an option of this one.
    outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    try:
        done = subprocess.run(
            command, input=text, env=outer, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            f"launch.kind: slurm needs {command[0]}, which is not on PATH here; run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]}: no answer from Slurm within {_TIMEOUT_S} s; is the controller up?") from None
    if done.returncode:
        lines = [line.removeprefix(f"{command[0]}: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise LaunchError(f"{command[0]}: {'; '.join(lines)} (site.* and launch.* hold what it was asked for)")
    return done.stdout


def _ask(command: list[str]) -> str:
    """What a command prints; nothing where there is none or it fails."""
    done = _call(command)
    return "" if done is None or done.returncode else done.stdout


def _call(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    env = os.environ | {"SLURM_BITSTR_LEN": "0"}  # array task lists in full
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
