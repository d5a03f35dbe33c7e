"""The share of a run that its steps spend waiting for batches, with batches made ahead and without.

    python -m tests.bench.loader [steps=60] [OVERRIDE ...]

Runs the default training run, its text and its model, on this machine for `steps` updates, once as `mbfn.train` does
and once with every batch made when it is asked for. Overrides change the run: `data=chat data.path=... init.hf=DIR`.
Nothing is asserted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

import mbfn
from mbfn import megatron
from mbfn.config.run import RunConfig
from mbfn.data import Dataset, open_dataset, prefetched, read_batch
from mbfn.train.guard import Guard
from mbfn.train.state import TrainState
from mbfn.train.step import Batch, make_step

Steps = list[tuple[float, float]]  # seconds waited, and learned


def main() -> None:
    """Run both ways and print the shares."""
    options = [argument for argument in sys.argv[1:] if argument.startswith("steps=")]
    steps = int(options[0].partition("=")[2]) if options else 60
    run = mbfn.compose(*(argument for argument in sys.argv[1:] if argument not in options))
    data = open_dataset(run)
    print(f"{data.description}; {run.model.num_parameters:,} parameters")
    for name, ahead in (("made ahead", True), ("made when asked for", False)):
        found = timed(run, data, steps, ahead=ahead)
        waited, learned = (sum(values) for values in zip(*found[5:], strict=True))
        each = 1000 / len(found[5:])
        print(
            f"{name:20}{each * waited:8.3f} ms waited of {each * (waited + learned):8.1f} ms a step: "
            f"{waited / (waited + learned):.3%}"
        )


def timed(run: RunConfig, data: Dataset, steps: int, *, ahead: bool) -> Steps:
    """Each step's time for its batch, and for its update."""
    found: Steps = []
    with megatron.open_world(run.parallel, device=run.launch.device, timeout_s=60) as world:
        models = megatron.build(run, world, None)
        state, step = TrainState(step=0, tokens=0, models=models, guard=Guard()), make_step(run, world)
        batches: Iterable[Batch] = (read_batch(data.train, run, number, 0) for number in range(steps))
        source: Iterator[Batch] = iter(prefetched(batches) if ahead else batches)
        for _ in range(steps):
            started = time.perf_counter()
            batch = next(source)
            ready = time.perf_counter()
            state, _ = step(state, batch)
            found.append((ready - started, time.perf_counter() - ready))
    return found


if __name__ == "__main__":
    main()
