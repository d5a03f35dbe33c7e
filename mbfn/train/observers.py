"""What watches the steps of a run, from metrics alone: records, the bar, trackers, the profiler, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mbfn.config.run import RunConfig
from mbfn.megatron import World
from mbfn.train.events import note_event
from mbfn.train.loop import Observer
from mbfn.train.meter import make_meter
from mbfn.train.profiler import profiled
from mbfn.train.progress import progress
from mbfn.train.record import recorded
from mbfn.train.state import Metrics, TrainState
from mbfn.train.stragglers import Straggler, comparing
from mbfn.train.trackers import tracking

METRICS = "metrics.jsonl"


@contextmanager
def observing(
    run: RunConfig, world: World, output_dir: Path, console: Console, start: int
) -> Iterator[tuple[Observer, ...]]:
    """What sees every step of this rank after step `start`. Some of it works on rank 0 alone."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        observers: list[Observer] = []
        if world.rank == 0:
            path = output_dir / METRICS
            observers.append(stack.enter_context(recorded(path, run.log.interval, run.train.steps, start)))
            if run.log.trackers:
                observers.append(stack.enter_context(tracking(run, output_dir, start, say)))
            if run.log.progress:
                observers.append(stack.enter_context(progress(start, run.train.steps, console)))
        if run.log.straggler_interval and world.world_size > 1:
            report = _reporter(output_dir, say)
            observers.append(comparing(world, run.log.straggler_interval, report))
        if run.log.debug_checks:
            from mbfn.train.checks import check_metrics

            observers.append(lambda _, metrics: check_metrics(metrics))
        if run.profile.kind != "none" and world.rank in run.profile.ranks:
            observers.append(stack.enter_context(profiled(run, world, output_dir, start)))
        yield (metered(make_meter(run, world), observers),)


def _reporter(output_dir: Path, say: Callable[[str], object]) -> Callable[[int, list[Straggler], dict[str, Any]], None]:
    """Note what the ranks took, and say who was slow."""

    def report(step: int, found: list[Straggler], figures: dict[str, Any]) -> None:
        slow = [asdict(straggler) for straggler in found]
        note_event(output_dir, {"step": step, "event": "ranks", **figures, "slow": slow})
        for straggler in found:
            say(f"step {step}: {straggler}")

    return report


def metered(meter: Callable[[Metrics], Metrics], observers: Sequence[Observer]) -> Observer:
    """One observer for all of `observers`, which see what `meter` adds."""

    def observe(state: TrainState, metrics: Metrics) -> None:
        whole = meter(metrics)
        for each in observers:
            each(state, whole)

    return observe
