"""The pipeline schedule: what each stage does in which order, as Megatron-core's 1F1B and interleaved schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mbfn.config.parallel import ParallelConfig

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One micro-batch through one chunk of a stage."""

    kind: Kind
    chunk: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A task with its time."""

    stage: int
    task: Task
    start: float
    stop: float


def warmup(parallel: ParallelConfig, stage: int, microbatches: int) -> int:
    """Forward tasks that a stage does before its first backward task, the one right before it left out."""
    ahead = parallel.pp - stage - 1
    wanted = ahead if parallel.vpp == 1 else 2 * ahead + (parallel.vpp - 1) * parallel.pp
    return min(wanted, microbatches * parallel.vpp)


def in_flight(parallel: ParallelConfig, stage: int, microbatches: int) -> tuple[int, ...]:
    """Micro-batches of each chunk whose activations a stage holds at once, at its fullest."""
    count = min(warmup(parallel, stage, microbatches) + 1, microbatches * parallel.vpp)
    groups, rest = divmod(count, parallel.pp * parallel.vpp)
    started = (min(max(rest - chunk * parallel.pp, 0), parallel.pp) for chunk in range(parallel.vpp))
    return tuple(groups * parallel.pp + more for more in started)


def bubble(parallel: ParallelConfig, microbatches: int) -> float:
    """Idle share of a step whose stages take equally long."""
    waiting = (parallel.pp - 1) / parallel.vpp
    return waiting / (microbatches + waiting)


def tasks(parallel: ParallelConfig, stage: int, microbatches: int) -> tuple[Task, ...]:
    """Everything that a stage does in a step, in order: warm-up, one forward one backward, cool-down."""
    total, before = microbatches * parallel.vpp, warmup(parallel, stage, microbatches)
    order: list[Task] = []
    for position in range(total + before):
        if position < total:
            chunk, microbatch = _place(parallel, position)
            order.append(Task(kind="forward", chunk=chunk, microbatch=microbatch))
        if position >= before:
            chunk, microbatch = _place(parallel, position - before)
            order.append(Task(kind="backward", chunk=parallel.vpp - 1 - chunk, microbatch=microbatch))
    return tuple(order)


def timeline(
    parallel: ParallelConfig, microbatches: int, seconds: Sequence[Sequence[tuple[float, float]]]
) -> tuple[Slot, ...]:
    """When every task runs if it starts as soon as its stage and its input are there.

    `seconds[stage][chunk]` are a (forward, backward) pair; sending takes no time.
    """
    queues = [list(tasks(parallel, stage, microbatches)) for stage in range(parallel.pp)]
    ends: dict[tuple[Kind, int, int], float] = {}  # (kind, virtual stage, micro-batch) -> time
    free = [0.0] * parallel.pp
    slots: list[Slot] = []
    while any(queues):
        before = len(slots)
        for stage, queue in enumerate(queues):
            while queue and (ready := _ready(ends, parallel, stage, queue[0])) is not None:
                task = queue.pop(0)
                start = max(free[stage], ready)
                free[stage] = start + seconds[stage][task.chunk][task.kind == "backward"]
                ends[task.kind, task.chunk * parallel.pp + stage, task.microbatch] = free[stage]
                slots.append(Slot(stage=stage, task=task, start=start, stop=free[stage]))
        assert len(slots) > before, "the schedule waits for itself"
    return tuple(slots)


def _place(parallel: ParallelConfig, position: int) -> tuple[int, int]:
    """(chunk, micro-batch) of the forward task at `position`: pp micro-batches through one chunk, then the next."""
    group, inside = divmod(position, parallel.pp * parallel.vpp)
    chunk, number = divmod(inside, parallel.pp)
    return chunk, group * parallel.pp + number


def _ready(ends: dict[tuple[Kind, int, int], float], parallel: ParallelConfig, stage: int, task: Task) -> float | None:
    """When a task's input is there: none while what makes it has not run."""
    place, last = task.chunk * parallel.pp + stage, parallel.pp * parallel.vpp - 1
    if task.kind == "forward":
        return 0.0 if place == 0 else ends.get(("forward", place - 1, task.microbatch))
    if place == last:
        return ends.get(("forward", place, task.microbatch))
    return ends.get(("backward", place + 1, task.microbatch))
