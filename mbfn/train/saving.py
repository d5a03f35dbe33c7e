"""The checkpoints that a run makes, at most one of them under way, and what becomes of one that cannot be written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbfn import megatron
from mbfn.config.run import RunConfig
from mbfn.errors import CheckpointError
from mbfn.megatron import World
from mbfn.storage.atomic import clean
from mbfn.train.checkpoints import checkpoint_path, complete_checkpoints, prune, run_record, step_of
from mbfn.train.guard import Guard
from mbfn.train.state import Metrics, TrainState

FAILED = 255  # no signal, but handed round like one: a checkpoint could not be written, and that ends the run


class Checkpoints:
    """A rank's part of saving. Every rank calls the same methods at the same steps, `failed` apart."""

    def __init__(
        self, run: RunConfig, root: Path, world: World, facts: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._run, self._root, self._world, self._warn = run, root, world, warn
        self._facts = facts  # what does not change over a run, for each manifest
        self._saver = megatron.Saver(world)
        self._valid: tuple[int, float | None] = (-1, None)  # step and held-out loss of the last step seen
        self._error = ""

    def save(self, state: TrainState, *, valid_loss: float | None = None, wait: bool = False) -> None:
        """Begin a checkpoint of `state`, or with `wait` make it.

        Raises: CheckpointError where this or the one before fails and `checkpoint.on_failure=stop`.
        """
        self.settle()
        run, position = self._run, state.step + state.guard.shift
        record = run_record(run, self._facts["data"], state.step, state.tokens) | {"guard": asdict(state.guard)}
        where = {"step": state.step, "tokens": state.tokens, "batch": position, "valid_loss": valid_loss}
        where["samples"] = position * run.train.global_batch_size
        background = run.checkpoint.async_save and not wait
        megatron.begin_save(
            self._saver,
            checkpoint_path(self._root, state.step),
            run,
            self._world,
            state.models,
            record,
            record=where | dict(self._facts),
            background=background,
            then=lambda: prune(self._root, run.checkpoint),
        )
        if not background:
            self.settle()

    def observe(self, state: TrainState, metrics: Metrics) -> None:
        """An observer of steps that saves when it is due."""
        interval = self._run.checkpoint.interval
        self._valid = state.step, metrics.valid_loss
        if interval and state.step % interval == 0 and state.step != self._run.train.steps:
            self.save(state, valid_loss=metrics.valid_loss)

    def last(self, state: TrainState) -> None:
        """Leave a whole checkpoint of `state`, where none is under way or there already."""
        self.settle()
        if checkpoint_path(self._root, state.step) not in complete_checkpoints(self._root):
            step, loss = self._valid
            self.save(state, valid_loss=loss if step == state.step else None, wait=True)

    def failed(self) -> int:
        """`FAILED` once this rank knows of a save that failed and is to end the run; 0 otherwise. Waits for nothing."""
        if self._saver.ended:
            self._judge(self._saver.finish())
        return FAILED if self._error else 0

    def settle(self) -> None:
        """Wait for the save under way.

        Raises: CheckpointError where it failed and `checkpoint.on_failure=stop`.
        """
        self._judge(self._saver.finish())
        if self._error:
            raise CheckpointError(self._error)

    def restore(self, state: TrainState) -> TrainState:
        """The state of the last complete checkpoint, in the models of `state`. Collective.

        Of those at `checkpoint.interval`: one that a stop left is not there in the run that was not stopped.

        Raises: CheckpointError where there is none.
        """
        self.settle()
        found = complete_checkpoints(self._root)
        if not found:
            raise CheckpointError(f"{self._root}: no complete checkpoint to go back to; set checkpoint.interval")
        interval = self._run.checkpoint.interval
        regular = [path for path in found if step_of(path) % interval == 0] if interval else found[:1]
        record = megatron.load((regular or found)[-1], self._run, self._world, state.models)
        return TrainState(
            step=record["step"], tokens=record["tokens"], models=state.models, guard=Guard.of_record(record)
        )

    def _judge(self, error: str) -> None:
        if error and self._run.checkpoint.on_failure == "continue":
            self._warn(f"{error}; going on without it (checkpoint.on_failure=continue)")
        elif error:
            self._error = error


def clear_leftovers(root: Path) -> None:
    """Remove what writers that died left under `root`: directories they had not put in place."""
    for draft in root.glob(".step_*.draft-*"):
        clean(root / draft.name.removeprefix(".").partition(".")[0])
    for dropped in root.glob(".dropped_*"):
        shutil.rmtree(dropped, ignore_errors=True)
