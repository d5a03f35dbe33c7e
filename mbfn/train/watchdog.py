"""A thread of each rank that ends a run of which a rank hangs, has stopped or has failed, and says which and where.

Each rank tells the others by the store of the process group that it lives, looks whether the next rank still does, and
whether any has failed. So every rank is watched by one, and what a run costs to watch grows with its ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mbfn.errors import MbfnError
from mbfn.train.failures import Failure, failure_of, note_of, write_failure
from mbfn.train.pulse import Place, Pulse

_ABORT = "abort"
_TIMES_LONGEST = 3  # a step may take so much longer than the longest so far, beyond `hang_s`
_LOOKS = 20  # in `hang_s`
_LONG_S = 10.0  # for a failed rank to come to its own end
_STEADY = ("loading data", "computing", "recording")  # phases that take about as long at each step


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a rank's watch needs to know."""

    rank: int
    world_size: int
    pulse: Pulse
    notes: Path  # where failures are noted
    hang_s: float  # of silence, or of a step beyond its usual time
    timeout_s: float  # of anything else: the first step, evaluations, saves


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside, this process ends should any rank hang, stop or fail; an error that leaves ends the other ranks too."""
    watch.notes.mkdir(parents=True, exist_ok=True)
    note_of(watch.notes, watch.rank).unlink(missing_ok=True)
    if not watch.hang_s:
        with _noted(watch, None):
            yield
        return
    thread = _Watcher(watch)
    thread.start()
    with _noted(watch, thread):
        yield
    thread.leave()


@contextlib.contextmanager
def _noted(watch: Watch, thread: _Watcher | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        failure = failure_of(watch.rank, error, str(watch.pulse.place))
        with contextlib.suppress(OSError):  # a full disk: the error itself still reaches the launcher
            write_failure(watch.notes, failure)
        if not isinstance(error, MbfnError):
            sys.stderr.write(f"error: {failure.line}\n")
        if thread is not None:
            thread.fail(failure)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beat:
    """A sign of life."""

    count: int
    host: str
    pid: int
    step: int
    order: int
    left: bool  # the rank is past the part of the run that is watched

    @property
    def place(self) -> Place:
        """Where the rank was."""
        return Place(step=self.step, order=self.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """Which rank ends the run, as all ranks read it."""

    failure: Failure
    by: int  # the rank that found it
    host: str = ""
    pid: int = 0
    raised: bool = False  # the rank has noted its failure itself, and ends itself


class _Watcher:
    """The thread of one rank."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._own = (socket.gethostname(), os.getpid())
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._failed: Failure | None = None
        self._store = dist.PrefixStore("watch", _own_store(2 * watch.hang_s / _LOOKS)) if watch.world_size > 1 else None
        self._count = 0
        self._clock = 0.0  # stands while this process is stopped itself
        self._answered = 0.0  # when the store did last
        self._marks = _Since()
        self._neighbour = _Since()
        self._longest = 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def leave(self) -> None:
        """End without ado: the others are told that silence means nothing from here on."""
        self._over.set()
        self._thread.join(_LONG_S)

    def fail(self, failure: Failure) -> None:
        """Tell the other ranks that this one has failed, and end it should it not come to its end itself."""
        self._failed = failure
        self._over.set()

    def _run(self) -> None:
        pause, before = self._watch.hang_s / _LOOKS, time.monotonic()
        over = False
        while not over:  # the first look is at once: a rank that stops now has been seen
            now = time.monotonic()
            self._clock, before = self._clock + min(now - before, 2 * pause), now
            try:
                self._look()
                self._answered = self._clock
            except RuntimeError:  # of the store
                self._end_without_store()
            over = self._over.wait(pause)
        with contextlib.suppress(RuntimeError):
            if self._failed is not None:
                self._tell(_Verdict(failure=self._failed, by=self._watch.rank, raised=True))
            else:
                self._beat(left=True)
        if self._failed is not None and self._store is not None:  # destructors of process groups can hang
            time.sleep(_LONG_S)
            os._exit(self._failed.exit_code)

    def _look(self) -> None:
        self._beat(left=False)
        if verdict := self._told() or self._own_stall() or self._silence():
            self._end(verdict)

    def _end_without_store(self) -> None:
        """Rank 0 holds the store, or the launcher, which may rest for longer."""
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        silent = self._clock - self._answered
        if silent > (self._watch.timeout_s if launcher else self._watch.hang_s):
            place = self._watch.pulse.place
            message = f"no answer for {silent:.0f} s: its process has stopped, or its host is gone"
            beat = _Beat(count=0, host="", pid=0, step=place.step, order=place.order, left=False)
            self._end(self._verdict(0, beat, message))

    def _beat(self, *, left: bool) -> None:
        if self._store is None:
            return
        self._count += 1
        place = self._watch.pulse.place
        host, pid = self._own
        beat = _Beat(count=self._count, host=host, pid=pid, step=place.step, order=place.order, left=left)
        self._store.set(f"beat/{self._watch.rank}", json.dumps(asdict(beat)))

    def _told(self) -> _Verdict | None:
        if self._store is None or not self._store.check([_ABORT]):
            return None
        fields = json.loads(self._store.get(_ABORT))
        return _Verdict(**{**fields, "failure": Failure(**fields["failure"])})

    def _tell(self, verdict: _Verdict) -> _Verdict:
        """Make `verdict` everyone's, unless there is one: then that."""
        if self._store is None:
            return verdict
        self._store.compare_set(_ABORT, "", json.dumps(asdict(verdict)))
        return self._told() or verdict

    def _silence(self) -> _Verdict | None:
        """The next rank's failure where it has shown no sign of life for too long."""
        if self._store is None:
            return None
        rank = (self._watch.rank + 1) % self._watch.world_size
        known = self._store.check([f"beat/{rank}"])
        text = self._store.get(f"beat/{rank}") if known else b""
        beat = _Beat(**json.loads(text)) if known else _Beat(count=0, host="", pid=0, step=0, order=0, left=False)
        silent = self._neighbour.still(text, self._clock)
        if silent < self._watch.hang_s or beat.left:
            return None
        message = f"no sign of life for {silent:.0f} s: its process has stopped, or {beat.host or 'its host'} is gone"
        return self._tell(self._verdict(rank, beat, message))

    def _own_stall(self) -> _Verdict | None:
        """The failure of the rank that this one waits for, where it has waited for too long."""
        place = self._watch.pulse.place
        before = self._marks.since
        stalled = self._marks.still(place.marks, self._clock)
        if stalled == 0.0 and self._past_first(place):
            self._longest = max(self._longest, self._clock - before)
        beats = {self._watch.rank: self._here(place)}
        if stalled < self._limit(place):
            return None
        if self._store is not None:
            ranks = range(self._watch.world_size)
            found = self._store.multi_get([f"beat/{rank}" for rank in ranks])
            beats |= {rank: _Beat(**json.loads(text)) for rank, text in zip(ranks, found, strict=True)}
        last = min(beats, key=lambda rank: (beats[rank].left, beats[rank].place))
        if stalled < self._limit(beats[last].place):
            return None
        alone = beats[last].place < max(beat.place for beat in beats.values()) or len(beats) == 1
        why = "the other ranks wait for it" if alone and len(beats) > 1 else "every rank waits in the same place"
        message = f"no progress for {stalled:.0f} s" + (f"; {why}" if len(beats) > 1 else "")
        return self._tell(self._verdict(last, beats[last], message))

    def _past_first(self, place: Place) -> bool:
        """Whether the first step, which sets up much, is over."""
        first = self._watch.pulse.first
        return bool(first) and place.step > first + 1

    def _limit(self, place: Place) -> float:
        """How long a rank may stay there."""
        if place.phase not in _STEADY or not self._past_first(place):
            return max(self._watch.timeout_s, self._watch.hang_s)
        return self._watch.hang_s + _TIMES_LONGEST * self._longest

    def _here(self, place: Place) -> _Beat:
        host, pid = self._own
        return _Beat(count=self._count, host=host, pid=pid, step=place.step, order=place.order, left=False)

    def _verdict(self, rank: int, beat: _Beat, message: str) -> _Verdict:
        failure = Failure(
            rank=rank, time_ns=time.time_ns(), message=message, detail="", exit_code=1, where=str(beat.place)
        )
        return _Verdict(failure=failure, by=self._watch.rank, host=beat.host, pid=beat.pid)

    def _end(self, verdict: _Verdict) -> None:
        """End this process as `verdict` asks, with the stack of every thread in its log."""
        failure, mine = verdict.failure, verdict.failure.rank == self._watch.rank
        if not verdict.raised:
            sys.stderr.write(f"error: {failure.line}\n")
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            if mine:
                failure = replace(failure, where=str(self._watch.pulse.place), detail=_stack(self._main))
            if mine or verdict.by == self._watch.rank:
                with contextlib.suppress(OSError):
                    write_failure(self._watch.notes, failure)
            if not mine and verdict.host == self._own[0]:
                with contextlib.suppress(OSError):  # a stopped process runs on, notes where it was, and ends
                    os.kill(verdict.pid, signal.SIGCONT)
        sys.stderr.flush()
        os._exit(failure.exit_code)


class _Since:
    """How long something has been the same."""

    def __init__(self) -> None:
        self._what: Any = None
        self.since = 0.0

    def still(self, what: Any, now: float) -> float:
        """Seconds up to `now` that it has been `what`."""
        if what != self._what:
            self._what, self.since = what, now
        return now - self.since


def _own_store(pause: float) -> dist.Store:
    """A connection of its own: the process group's is taken while a rank waits."""
    store: dist.Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=pause))
    return store


def _stack(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    lines = traceback.format_stack(frame) if frame else []
    return "".join(["Stack of the rank's main thread (most recent call last):\n", *lines])
