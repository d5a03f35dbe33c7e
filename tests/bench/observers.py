"""What watching a run costs a step of 100 ms: records, trackers, the bar on a terminal, the watchdog.

    python -m tests.bench.observers [steps=100] [trackers=tensorboard,wandb,mlflow]

The step is matrix products on this machine's CPU. Two figures a set of observers: the time that the training thread
spends in them, and the CPU time of the process's other threads, which draw and write. W&B has a process of its own
beside these. Nothing is asserted.
"""

from __future__ import annotations

import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

STEP_S = 0.1
SETS = {
    "none": (),
    "metrics.jsonl": ("records",),
    "and the bar": ("records", "progress"),
    "and TensorBoard": ("records", "progress", "tensorboard"),
    "and W&B offline": ("records", "progress", "wandb"),
    "and MLflow": ("records", "progress", "mlflow"),
    "and the watchdog": ("records", "progress", "watchdog"),
}


def main() -> None:
    """One line a set of observers."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    steps = int(options.get("steps", "100"))
    wanted = options.get("trackers", "tensorboard,wandb,mlflow").split(",")
    torch.set_num_threads(1)
    work = _calibrated(STEP_S)
    print(f"{'observers':18}{'training thread, us a step':>28}{'of 100 ms':>11}{'other threads, of a core':>26}")
    base = 0.0
    for name, parts in SETS.items():
        if any(part in ("tensorboard", "wandb", "mlflow") and part not in wanted for part in parts):
            continue
        own, others = measured(parts, work, steps)
        base = others if name == "none" else base
        print(f"{name:18}{1e6 * own:>28.0f}{own / STEP_S:>11.2%}{others - base:>26.2%}", flush=True)


def measured(parts: Sequence[str], work: Callable[[], None], steps: int) -> tuple[float, float]:
    """Seconds a step that the training thread is in the observers, and the share of a core that all others take."""
    from mbfn.train.guard import Guard
    from mbfn.train.state import Metrics, TrainState

    state = TrainState(step=0, tokens=0, models=None, guard=Guard())  # type: ignore[arg-type]
    metrics = Metrics(step=0, loss=3.2, grad_norm=0.8, lr=1e-4, tokens=0, data_s=0.001, update_s=0.1)
    spent = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        observers = _observers(parts, Path(directory), steps, stack)
        before, began = time.process_time() - time.thread_time(), time.perf_counter()
        for step in range(1, steps + 1):
            work()
            done = time.perf_counter()
            for observe in observers:
                observe(state, replace(metrics, step=step, tokens=1024 * step, loss=3.2 - step / steps))
            spent.append(time.perf_counter() - done)
        others = (time.process_time() - time.thread_time() - before) / (time.perf_counter() - began)
    return statistics.median(spent), others


def _observers(parts: Sequence[str], directory: Path, steps: int, stack: ExitStack) -> list[Any]:
    from mbfn import compose, megatron
    from mbfn.train.meter import make_meter
    from mbfn.train.observers import metered
    from mbfn.train.progress import progress
    from mbfn.train.pulse import Pulse
    from mbfn.train.record import recorded
    from mbfn.train.trackers import tracking
    from mbfn.train.watchdog import Watch, watched

    trackers = [part for part in parts if part in ("tensorboard", "wandb", "mlflow")]
    run = compose(f"log.trackers=[{','.join(trackers)}]", f"train.steps={steps}")
    world = stack.enter_context(megatron.open_world(run.parallel, device="cpu"))
    found: list[Any] = []
    if "records" in parts:
        found.append(stack.enter_context(recorded(directory / "metrics.jsonl", 1, steps, 0)))
    if trackers:
        found.append(stack.enter_context(tracking(run, directory, 0, print)))
    if "progress" in parts:
        found.append(stack.enter_context(progress(0, steps, _terminal(stack))))
    if "watchdog" in parts:
        pulse = Pulse()
        watch = Watch(rank=0, world_size=1, pulse=pulse, notes=directory, hang_s=40.0, timeout_s=1800.0)
        stack.enter_context(watched(watch))
        found.append(lambda _, metrics: [pulse.mark(metrics.step, "computing") for _ in range(5)])
    return [metered(make_meter(run, world), found)] if found else []


def _terminal(stack: ExitStack) -> Console:
    """A console on a terminal whose other end somebody reads."""
    master, slave = pty.openpty()

    def read() -> None:
        while True:
            try:
                os.read(master, 65536)
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()
    file = stack.enter_context(os.fdopen(slave, "w"))
    return Console(file=file, force_terminal=True, width=120)


def _calibrated(seconds: float) -> Callable[[], None]:
    """Matrix products that take about `seconds` of one core."""
    matrix = torch.ones(512, 512)

    def products(count: int) -> float:
        started = time.process_time()
        for _ in range(count):
            matrix @ matrix
        return time.process_time() - started

    products(10)
    count = max(1, round(seconds / (products(50) / 50)))
    return lambda: products(count) and None


if __name__ == "__main__":
    main()
