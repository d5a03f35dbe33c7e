"""The functions that the fold is made of. Each closes over the run and the ranks, and keeps nothing between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from mbfn.config.optim import learning_rate
from mbfn.config.run import RunConfig
from mbfn.data import Dataset, micro_batches, train_rows, valid_rows
from mbfn.megatron import World, eval_step, train_step
from mbfn.train.state import Metrics, TrainState

Batch = tuple[Mapping[str, Tensor], ...]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState, Metrics], Metrics]


def batches(run: RunConfig, world: World, dataset: Dataset, start: int) -> Iterator[Batch]:
    """What this rank learns from at each update from number `start` to the end of the run."""
    for step in range(start, run.train.steps):
        yield _checked(micro_batches(train_rows(dataset, run, step), run, world.coordinates.dp), run)


def make_step(run: RunConfig, world: World) -> Step:
    """One update of the weights at the learning rate that its number has."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        lr = learning_rate(run.optim, run.schedule, run.train.steps, state.step)
        result = train_step(run, world, state.models, batch, lr=lr)
        after = replace(state, step=state.step + 1, tokens=state.tokens + result.tokens)
        metrics = Metrics(
            step=after.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=after.tokens,
            skipped=result.skipped,
        )
        return after, metrics

    return step


def make_evaluate(run: RunConfig, world: World, dataset: Dataset) -> Evaluate:
    """Add the mean loss on held-out text to metrics of a step at which it is due."""
    interval = run.train.eval_interval if dataset.valid_windows else 0

    def evaluate(state: TrainState, metrics: Metrics) -> Metrics:
        if not interval or (state.step % interval and state.step != run.train.steps):
            return metrics
        rows = (valid_rows(dataset, run, number) for number in range(run.train.eval_batches))
        held_out = (_checked(micro_batches(part, run, world.coordinates.dp), run) for part in rows)
        losses = [eval_step(run, world, state.models, batch) for batch in held_out]
        return replace(metrics, valid_loss=sum(losses) / len(losses))

    return evaluate


def _checked(batch: Batch, run: RunConfig) -> Batch:
    if run.log.debug_checks:
        from mbfn.train.checks import check_batch

        check_batch(batch, run)
    return batch
