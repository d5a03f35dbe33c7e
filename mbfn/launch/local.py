"""Several ranks on this machine, started and watched by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbfn.errors import LaunchError
from mbfn.train.failures import Failure, first_failure
from mbfn.train.pulse import pulse_of, read_place
from mbfn.train.stop import stop_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_CRASH = "Fatal Python error"
_SHUTDOWN_S = 60  # between asking ranks to end and killing them: one step and one checkpoint


def run_local(command: Sequence[str], nproc: int, logs: Path) -> int | None:
    """Run `command` as `nproc` ranks here; the signal that stopped them, none when all ran to their end.

    Ranks are expected to note their failures in `logs`, as `mbfn.launch.worker` does.

    Raises: LaunchError with the error of the rank that failed first; the others have ended by then.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for stale in (*logs.glob("rank_*.failure.json"), *logs.glob(".rank_*.pulse")):
        stale.unlink()
    with tempfile.TemporaryDirectory(prefix="mbfn-ranks-") as scratch:
        return _supervise(command, nproc, logs, scratch)


def _supervise(command: Sequence[str], nproc: int, logs: Path, scratch: str) -> int | None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet("torch.distributed.elastic")  # failures are reported once, below
    os.environ.update(_rank_defaults(os.environ, nproc))
    # torch before 2.13 waits its own 30 s for ranks that are told to end.
    patient = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    patience: dict[str, Any] = {"shutdown_timeout": _SHUTDOWN_S} if patient else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"mbfn-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in stop_signals()),
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
        **patience,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as stopped:
        return int(stopped.sigval)
    except ChildFailedError as error:
        raise _failed(error, logs) from None
    return None


def _quiet(package: str) -> None:
    """Silence every logger of `package`: torch gives each of its modules a level of its own."""
    for name in [package, *(name for name in logging.root.manager.loggerDict if name.startswith(f"{package}."))]:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _rank_defaults(env: Mapping[str, str], nproc: int) -> dict[str, str]:
    """One thread a rank: several pools on the same cores slow each other down."""
    return {"OMP_NUM_THREADS": "1"} if nproc > 1 and "OMP_NUM_THREADS" not in env else {}


def _failed(error: ChildFailedError, logs: Path) -> LaunchError:
    killed = sorted(
        (rank, -failure.exitcode)
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM
    )
    noted = first_failure(logs)
    if killed and not _own_failure(noted, killed):
        rank, number = killed[0]
        ended = f"ended by {signal.Signals(number).name}; the other ranks were stopped"
        text = f"rank {rank}{_where(logs, rank)}: {ended}; logs: {logs}"
        return LaunchError(text, _tail(logs, rank), known=False)
    if noted is not None:
        return LaunchError(f"{noted.line}; logs: {logs}", noted.detail, known=not noted.detail)
    rank, failure = error.get_first_failure()
    text = f"rank {rank}{_where(logs, rank)}: ended with exit code {failure.exitcode}; logs: {logs}"
    return LaunchError(text, known=False)


def _where(logs: Path, rank: int) -> str:
    place = read_place(pulse_of(logs, rank))
    return f", {place}" if place.marks else ""


def _tail(logs: Path, rank: int) -> str:
    """The stack that a rank left which crashed: faulthandler writes it to the rank's log."""
    log = logs / f"rank_{rank}.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text[text.rindex(_CRASH) :] if _CRASH in text else ""


def _own_failure(noted: Failure | None, killed: list[tuple[int, int]]) -> bool:
    """Whether the first noted failure is of a rank that was then killed itself, so the note says more."""
    return noted is not None and noted.rank in {rank for rank, _ in killed}
