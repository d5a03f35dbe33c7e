"""How a failing rank tells the process that started it what went wrong, and where."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from mbfn.errors import MbfnError


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended a rank. `detail` is the traceback, empty where the message says all."""

    rank: int
    time_ns: int
    message: str
    detail: str
    exit_code: int
    where: str = ""  # the place of the rank in its run

    @property
    def line(self) -> str:
        """Rank, place and error in one line."""
        return f"rank {self.rank}{f', {self.where}' if self.where else ''}: {self.message}"


def failure_of(rank: int, error: BaseException, where: str = "") -> Failure:
    """The failure that `error` is for `rank`."""
    known = isinstance(error, MbfnError)
    return Failure(
        rank=rank,
        time_ns=time.time_ns(),
        message=str(error) if known else f"{type(error).__name__}: {error}",
        detail="" if known else "".join(traceback.format_exception(error)),
        exit_code=error.exit_code if isinstance(error, MbfnError) else 1,
        where=where,
    )


def write_failure(directory: Path, failure: Failure) -> None:
    """Note `failure` where the launcher looks, in place of an earlier note of the same rank."""
    part = directory / f".rank_{failure.rank}.failure.{os.getpid()}.part"
    part.write_text(json.dumps(asdict(failure)))
    os.replace(part, note_of(directory, failure.rank))


def note_of(directory: Path, rank: int) -> Path:
    """The file of a rank's failure."""
    return directory / f"rank_{rank}.failure.json"


def first_failure(directory: Path) -> Failure | None:
    """The failure that came first: later ones are ranks that lost their peer."""
    files = sorted(directory.glob("rank_*.failure.json"))
    return min((Failure(**json.loads(file.read_text())) for file in files), key=lambda f: f.time_ns, default=None)
