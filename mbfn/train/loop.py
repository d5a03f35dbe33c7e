"""The fold over batches and what watches it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from mbfn.megatron import World
from mbfn.train.pulse import Pulse
from mbfn.train.state import Metrics, TrainState
from mbfn.train.step import Batch, Evaluate, Step

Observer = Callable[[TrainState, Metrics], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why a fold is over: a signal, a step that must not be taken up, or, with neither, no more batches."""

    signal: int = 0
    fault: Metrics | None = None


def fold(
    state: TrainState,
    batches: Iterator[Batch],
    *,
    step: Step,
    evaluate: Evaluate,
    observers: Sequence[Observer],
    stop: Callable[[], int],
    pulse: Pulse,
) -> tuple[TrainState, End]:
    """The state after `batches`, after the step at which `stop` first gave a signal, or before a step with a fault."""
    while True:
        number, started = state.step + 1, time.perf_counter()
        pulse.mark(number, "loading data")
        batch = next(batches, None)
        if batch is None:
            return state, End()
        loaded = time.perf_counter()
        pulse.mark(number, "computing")
        state, metrics = step(state, batch)
        if metrics.response in ("stop", "roll_back"):
            return state, End(fault=metrics)
        updated = time.perf_counter()
        pulse.mark(number, "evaluating")
        metrics = evaluate(state, metrics)
        seconds = time.perf_counter() - started
        metrics = replace(metrics, seconds=seconds, data_s=loaded - started, update_s=updated - loaded)
        pulse.mark(number, "recording")
        for observe in observers:
            observe(state, metrics)
        if signal := stop():
            return state, End(signal=signal)


def agree(stop: Callable[[], int], world: World) -> Callable[[], int]:
    """`stop` for all ranks: the same answer everywhere at the same step, whichever rank got the signal. Collective."""

    def agreed() -> int:
        if world.world_size == 1:
            return stop()
        signal = torch.tensor([stop()], device=world.device)
        dist.all_reduce(signal, op=dist.ReduceOp.MAX)
        return int(signal.item())

    return agreed
