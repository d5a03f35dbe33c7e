"""What watches the steps of a run, from metrics alone: records, the bar, trackers, the profiler, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from mbfn.config.run import RunConfig
from mbfn.megatron import World
from mbfn.train.loop import Observer
from mbfn.train.meter import make_meter
from mbfn.train.progress import progress
from mbfn.train.record import recorded
from mbfn.train.state import Metrics, TrainState

METRICS = "metrics.jsonl"


@contextmanager
def observing(
    run: RunConfig, world: World, output_dir: Path, console: Console, start: int
) -> Iterator[tuple[Observer, ...]]:
    """What sees every step of this rank after step `start`. Some of it works on rank 0 alone."""
    with ExitStack() as stack:
        observers: list[Observer] = []
        if world.rank == 0:
            path = output_dir / METRICS
            observers.append(stack.enter_context(recorded(path, run.log.interval, run.train.steps, start)))
            if run.log.progress:
                observers.append(stack.enter_context(progress(start, run.train.steps, console)))
        if run.log.debug_checks:
            from mbfn.train.checks import check_metrics

            observers.append(lambda _, metrics: check_metrics(metrics))
        yield (metered(make_meter(run, world), observers),)


def metered(meter: Callable[[Metrics], Metrics], observers: Sequence[Observer]) -> Observer:
    """One observer for all of `observers`, which see what `meter` adds."""

    def observe(state: TrainState, metrics: Metrics) -> None:
        whole = meter(metrics)
        for each in observers:
            each(state, whole)

    return observe
