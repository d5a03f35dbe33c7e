"""How a failing rank tells the process that started it what went wrong."""

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


def write_failure(directory: Path, rank: int, error: BaseException) -> Failure:
    """Note `error` of `rank` where the launcher looks."""
    known = isinstance(error, MbfnError)
    failure = Failure(
        rank=rank,
        time_ns=time.time_ns(),
        message=str(error) if known else f"{type(error).__name__}: {error}",
        detail="" if known else "".join(traceback.format_exception(error)),
        exit_code=error.exit_code if isinstance(error, MbfnError) else 1,
    )
    part = directory / f".rank_{rank}.failure.part"
    part.write_text(json.dumps(asdict(failure)))
    os.replace(part, directory / f"rank_{rank}.failure.json")
    return failure


def first_failure(directory: Path) -> Failure | None:
    """The failure that came first: later ones are ranks that lost their peer."""
    files = sorted(directory.glob("rank_*.failure.json"))
    return min((Failure(**json.loads(file.read_text())) for file in files), key=lambda f: f.time_ns, default=None)
