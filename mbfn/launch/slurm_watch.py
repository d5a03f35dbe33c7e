"""Waiting for jobs of the cluster, and what to say when one ends."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mbfn.launch.results import finished
from mbfn.launch.slurm_files import Submission, attempts
from mbfn.launch.slurm_queue import LOST, JobState, down_nodes, job_states
from mbfn.launch.slurm_script import SAVED
from mbfn.train.failures import first_failure
from mbfn.train.job import Job
from mbfn.train.stop import REQUEUE

_LAST_LINES = 15
_STOPS = {LOST, "PREEMPTED", "TIMEOUT"}  # with the state saved nothing is lost: that is no failure
_OWN_CAUSE = {
    "CANCELLED": "the job was cancelled",
    "NODE_FAIL": "a node was lost",
    "TIMEOUT": "the time limit came before the state was saved; raise launch.signal_s above the longest step and save",
    "PREEMPTED": "another job took the nodes",
    "DEADLINE": "the deadline of the job passed",
    "BOOT_FAIL": "a node did not start",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a job ended: the exit code for the client, one line, and what to show below it."""

    code: int
    text: str
    detail: str = ""


def wait(
    submissions: Mapping[Path, Submission],
    *,
    poll_s: float,
    stop: Callable[[], int],
    changed: Callable[[Path, JobState], None],
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[Path, JobState] | None:
    """The last states once all jobs, by output directory, are over; none when `stop` gave a signal before.

    `meanwhile` is called after every look, and `changed` whenever the state of a job, its restarts or the reason that
    it waits for are new.
    """
    seen: dict[Path, JobState] = {}
    while True:
        states = job_states([submission.job_id for submission in submissions.values()])
        meanwhile()
        for place, submission in submissions.items():
            now, before = states[submission.job_id], seen.get(place)
            if before is None or _visible(now) != _visible(before):
                changed(place, now)
            seen[place] = now
        if all(state.over for state in seen.values()):
            return seen
        end = time.monotonic() + poll_s
        while (left := end - time.monotonic()) > 0:
            if stop():
                return None
            time.sleep(min(left, 0.2))


def describe(state: JobState) -> str:
    """`job 12: PENDING (Resources)`."""
    why = f" ({state.reason})" if state.reason and not state.over else ""
    again = f", start {state.restarts + 1}" if state.restarts else ""
    return f"job {state.job_id}: {state.state}{why}{again}"


def end_of(state: JobState, job: Job, log: Path) -> End:
    """What the end of a job means, with its cause: a rank's own failure, a lost node, a limit, a cancellation."""
    places = attempts(job.output_dir, None if state.state == LOST else state.raw_id)
    attempt = places[-1] if places else job.output_dir
    if state.state == "COMPLETED" or (state.state == LOST and finished(job.run, job.output_dir)):
        return End(code=0, text="done")
    saved = (attempt / SAVED).exists()
    if saved and (state.state in _STOPS or state.exit_code.startswith(f"{REQUEUE}:")):
        text = f"job {state.job_id}: stopped and saved; the same command with this output directory goes on"
        return End(code=REQUEUE, text=text)
    where = f"job {state.job_id} {state.state}{_exit(state)}; logs: {log}, {attempt}"
    failure = first_failure(attempt)
    if failure is not None and state.state not in _OWN_CAUSE:
        return End(code=1, text=f"{failure.line}; {where}", detail=failure.detail)
    if cause := _cause(state):
        return End(code=1, text=f"{cause}{'; its state is saved' if saved else ''}; {where}")
    cause = "ended without a word from its ranks; the last lines of its log are below"
    return End(code=1, text=f"{cause}; {where}", detail=_tail(log))


def _cause(state: JobState) -> str:
    lost = "; ".join(down_nodes(state.nodes)) if state.state == "NODE_FAIL" else ""
    return lost or state.comment or _OWN_CAUSE.get(state.state, "")


def _exit(state: JobState) -> str:
    code, _, number = state.exit_code.partition(":")
    if number not in ("", "0"):
        return f" by {signal.Signals(int(number)).name}"
    return f" with exit code {code}" if code not in ("", "0") else ""


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    except OSError as error:
        lines = [f"{log}: {error.strerror}"]
    return "".join(f"{line}\n" for line in lines)


def _visible(state: JobState) -> tuple[str, str, int]:
    return state.state, "" if state.over else state.reason, state.restarts


def follow(path: Path) -> Iterator[None]:
    """A growing file to stdout: each `next` prints what is new."""
    shown = 0
    while True:
        if path.exists():
            with path.open("rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()
        yield
