"""The fold over batches and what watches it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from mbfn.megatron import World
from mbfn.train.state import Metrics, TrainState
from mbfn.train.step import Batch, Evaluate, Step

Observer = Callable[[TrainState, Metrics], None]


def fold(
    state: TrainState,
    batches: Iterable[Batch],
    *,
    step: Step,
    evaluate: Evaluate,
    observers: Sequence[Observer],
    stop: Callable[[], int],
) -> tuple[TrainState, int]:
    """The state after `batches`, or after the step at which `stop` first gave a signal, and that signal (0: none)."""
    for batch in batches:
        started, before = time.perf_counter(), state.tokens
        state, metrics = step(state, batch)
        learned = time.perf_counter() - started
        metrics = evaluate(state, metrics)
        rate = (state.tokens - before) / learned
        metrics = replace(metrics, seconds=time.perf_counter() - started, tokens_per_s=rate)
        for observe in observers:
            observe(state, metrics)
        if signal := stop():
            return state, signal
    return state, 0


def agree(stop: Callable[[], int], world: World) -> Callable[[], int]:
    """`stop` for all ranks: the same answer everywhere at the same step, whichever rank got the signal. Collective."""

    def agreed() -> int:
        if world.world_size == 1:
            return stop()
        signal = torch.tensor([stop()], device=world.device)
        dist.all_reduce(signal, op=dist.ReduceOp.MAX)
        return int(signal.item())

    return agreed
