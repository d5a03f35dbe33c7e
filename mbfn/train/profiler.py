"""A window of steps under a profiler, on the ranks that `profile.ranks` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from mbfn.config.run import RunConfig
from mbfn.megatron import World
from mbfn.train.loop import Observer
from mbfn.train.state import Metrics, TrainState

_ALLOCATIONS = 200_000  # that a memory snapshot holds at most

Finish = Callable[[], None]


@contextmanager
def profiled(run: RunConfig, world: World, output_dir: Path, start: int) -> Iterator[Observer]:
    """An observer that opens the window after the step before it and closes it after its last step, or at the end."""
    config = run.profile
    begin = {"torch": _torch, "nsight": _nsight, "memory": _memory}[config.kind]
    directory = output_dir / "profile"
    directory.mkdir(exist_ok=True)
    open_windows: list[tuple[Observer, Finish]] = []

    def turn(step: int) -> None:
        if step == config.start - 1:
            open_windows.append(begin(run, world, directory))
        elif open_windows and step >= config.last:
            open_windows.pop()[1]()

    def observe(state: TrainState, metrics: Metrics) -> None:
        for each, _ in open_windows:
            each(state, metrics)
        turn(metrics.step)

    turn(start)
    try:
        yield observe
    finally:
        for _, finish in open_windows:
            finish()


def _torch(run: RunConfig, world: World, directory: Path) -> tuple[Observer, Finish]:
    cuda = world.device.type == "cuda"
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
        record_shapes=run.profile.shapes,
        with_stack=run.profile.stack,
    )
    profiler.start()

    def finish() -> None:
        profiler.stop()
        profiler.export_chrome_trace(str(directory / f"rank_{world.rank}.trace.json.gz"))

    return lambda state, metrics: None, finish


def _nsight(run: RunConfig, world: World, directory: Path) -> tuple[Observer, Finish]:
    """The window of `nsys profile --capture-range=cudaProfilerApi`, with a range a step and one an operator."""
    del world, directory
    torch.cuda.profiler.start()
    operators = torch.autograd.profiler.emit_nvtx(record_shapes=run.profile.shapes)
    operators.__enter__()
    torch.cuda.nvtx.range_push(f"step {run.profile.start}")

    def observe(_: TrainState, metrics: Metrics) -> None:
        torch.cuda.nvtx.range_pop()
        torch.cuda.nvtx.range_push(f"step {metrics.step + 1}")

    def finish() -> None:
        torch.cuda.nvtx.range_pop()
        operators.__exit__(None, None, None)
        torch.cuda.profiler.stop()

    return observe, finish


def _memory(run: RunConfig, world: World, directory: Path) -> tuple[Observer, Finish]:
    del run
    torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)

    def finish() -> None:
        torch.cuda.memory._dump_snapshot(str(directory / f"rank_{world.rank}.memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)

    return lambda state, metrics: None, finish
