"""Where a rank is in its run, told to whoever watches it."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Phase = Literal["starting", "loading data", "computing", "evaluating", "recording", "saving", "ending"]

_PHASES: tuple[Phase, ...] = get_args(Phase)
_FORMAT = struct.Struct("<qqq")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """A moment of a rank. Ordered: the least of several ranks is the one that the others wait for."""

    step: int = 0  # the update that it works on
    order: int = 0  # of the phase within the step
    marks: int = 0  # made so far: a rank whose marks stand still makes no progress

    @property
    def phase(self) -> Phase:
        """What it does there."""
        return _PHASES[self.order]

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})" if self.step else self.phase


class Pulse:
    """A rank's own record of its place, in memory that outlives the process where a file is given.

    Its one writer is the rank's main thread; a mark costs less than a microsecond.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.first = 0  # update that was marked; 0: none yet
        self._marks = 0
        self._memory = _memory(path)

    def mark(self, step: int, phase: Phase) -> None:
        """Be at `phase` of update number `step`."""
        self._marks += 1
        self.first = self.first or step
        _FORMAT.pack_into(self._memory, 0, step, _PHASES.index(phase), self._marks)

    @property
    def place(self) -> Place:
        """The last mark."""
        return _place(self._memory[:])


def _memory(path: Path | None) -> mmap.mmap:
    """Shared with the file where there is one: a disk too full for it is found by what has to be written."""
    if path is None:
        return mmap.mmap(-1, _FORMAT.size)
    try:
        path.write_bytes(bytes(_FORMAT.size))
    except OSError:
        return mmap.mmap(-1, _FORMAT.size)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _FORMAT.size)


def read_place(path: Path) -> Place:
    """The last mark of a rank, whether it is still alive or not; the start where it made none."""
    return _place(path.read_bytes()) if path.is_file() else Place()


def pulse_of(logs: Path, rank: int) -> Path:
    """The file of a rank's pulse."""
    return logs / f".rank_{rank}.pulse"


def _place(data: bytes) -> Place:
    if len(data) < _FORMAT.size:
        return Place()
    step, order, marks = _FORMAT.unpack(data)
    return Place(step=step, order=order, marks=marks)
