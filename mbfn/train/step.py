"""The functions that the fold is made of. Each closes over the run and the ranks, and keeps nothing between calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace

from torch import Tensor

from mbfn.config.optim import learning_rate
from mbfn.config.run import RunConfig
from mbfn.data import Dataset, prefetched, read_batch
from mbfn.megatron import Loss, StepResult, World, eval_step, train_step
from mbfn.peft import seed_dropout
from mbfn.train.guard import learned, make_judge, response
from mbfn.train.state import Metrics, TrainState

Batch = tuple[Mapping[str, Tensor], ...]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState, Metrics], Metrics]


def batches(run: RunConfig, world: World, dataset: Dataset, start: int, shift: int = 0) -> Generator[Batch]:
    """What this rank learns from at each update from number `start` to the end of the run, `shift` batches later."""
    rank = world.coordinates.dp
    made = (_checked(read_batch(dataset.train, run, step + shift, rank), run) for step in range(start, run.train.steps))
    yield from prefetched(made)


def make_step(run: RunConfig, world: World, loss: Loss | None = None) -> Step:
    """One update of the weights at the learning rate that its number has; the loss is the tokens' unless given."""
    minimised = loss or Loss()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        lr = learning_rate(run.optim, run.schedule, run.train.steps, state.step)
        seed_dropout(run, world, state.step + state.guard.shift)
        judge = make_judge(run.guard, state.guard, world)
        result = train_step(run, world, state.models, batch, lr=lr, loss=minimised, judge=judge)
        answer = response(run.guard, state.guard, result.fault) if result.fault else ""
        after = _after(run, state, result, answer)
        metrics = Metrics(
            step=state.step + 1,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=after.tokens,
            skipped=result.skipped,
            fault=result.fault,
            response=answer,
            terms=result.metrics,
            loss_scale=result.loss_scale,
        )
        return after, metrics

    return step


def _after(run: RunConfig, state: TrainState, result: StepResult, answer: str) -> TrainState:
    """The state that a step leaves. One that is to be undone or to end the run leaves the state as it was."""
    if answer in ("stop", "roll_back"):
        return state
    if answer == "skip":
        return replace(state, step=state.step + 1, guard=replace(state.guard, skips=state.guard.skips + 1))
    guard = state.guard if result.skipped else learned(run.guard, state.guard, result.loss)
    return replace(state, step=state.step + 1, tokens=state.tokens + result.tokens, guard=guard)


def make_evaluate(run: RunConfig, world: World, dataset: Dataset, loss: Loss | None = None) -> Evaluate:
    """Add the mean loss on held-out text to metrics of a step at which it is due."""
    measured = loss or Loss()
    interval, held_out = run.train.eval_interval, dataset.valid

    def evaluate(state: TrainState, metrics: Metrics) -> Metrics:
        if held_out is None or not interval or (state.step % interval and state.step != run.train.steps):
            return metrics
        read = (read_batch(held_out, run, number, world.coordinates.dp) for number in range(run.train.eval_batches))
        losses = [eval_step(run, world, state.models, _checked(batch, run), loss=measured) for batch in read]
        return replace(metrics, valid_loss=sum(losses) / len(losses))

    return evaluate


def _checked(batch: Batch, run: RunConfig) -> Batch:
    if run.log.debug_checks:
        from mbfn.train.checks import check_batch

        check_batch(batch, run)
    return batch
