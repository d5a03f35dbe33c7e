"""One rank's part of a run, from its start or its last checkpoint to its end or a signal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mbfn import megatron
from mbfn.config.run import RunConfig
from mbfn.data import Dataset, open_dataset
from mbfn.megatron import Models, World
from mbfn.train.checkpoints import (
    check_record,
    checkpoint_path,
    checkpoint_to_resume,
    complete_checkpoints,
    prune,
    run_record,
)
from mbfn.train.curve import draw_curve
from mbfn.train.events import note_event
from mbfn.train.export import export_hf, initial_weights
from mbfn.train.guard import Guard, rolled_back, stopped
from mbfn.train.job import Job
from mbfn.train.loop import Observer, agree, fold
from mbfn.train.observers import METRICS, observing
from mbfn.train.provenance import write_provenance
from mbfn.train.pulse import Pulse
from mbfn.train.record import read_records
from mbfn.train.sample import LARGEST, sample
from mbfn.train.state import Metrics, TrainState
from mbfn.train.step import batches, make_evaluate, make_step
from mbfn.train.stop import REQUEUE

CURVE, EXPORT = "curve.png", "hf"
_FROM_SCRATCH = 3e-4  # learning rates from here on undo what trained weights know


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """What stays the same over a run on one rank."""

    run: RunConfig
    output_dir: Path
    world: World
    dataset: Dataset
    console: Console
    pulse: Pulse

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.output_dir / "checkpoints"


def train(job: Job, stop: Callable[[], int], pulse: Pulse) -> int:
    """Train as `job` says; 0 at the end of the run, `REQUEUE` when a signal stopped it and its state is saved."""
    run = job.run
    dataset = open_dataset(run)
    resume = checkpoint_to_resume(run, job.output_dir / "checkpoints")
    with megatron.open_world(run.parallel, device=run.launch.device, timeout_s=run.launch.timeout_s) as world:
        if world.world_size > 1 and world.device.type == "cpu":
            torch.set_num_threads(1)
        session = Session(
            run=run,
            output_dir=job.output_dir,
            world=world,
            dataset=dataset,
            console=Console(quiet=world.rank > 0),
            pulse=pulse,
        )
        if world.rank == 0:
            write_provenance(job.output_dir, run, job.command, {"data": dataset.digest, "device": str(world.device)})
        state, signal = _run_steps(session, _start(session, resume), agree(stop, world))
        _save_last(session, state, stopped=bool(signal))
        if not signal and run.checkpoint.export_hf:
            export_hf(run, world, state.models, dataset.tokenizer, job.output_dir / EXPORT)
    if world.rank == 0:
        _show_results(session, state, stopped=bool(signal))
    return REQUEUE if signal else 0


def _start(session: Session, resume: Path | None) -> TrainState:
    """The state to begin with: of the checkpoint, of a Hugging Face directory, or random by `train.seed`."""
    run, world = session.run, session.world
    models = megatron.build(run, world, initial_weights(run, world) if resume is None else None)
    session.console.print(_opening(session, models, resume), highlight=False, soft_wrap=True)
    if run.init.hf is not None and run.optim.lr >= _FROM_SCRATCH:
        session.console.print(
            f"optim.lr={run.optim.lr:g} is a rate for random weights; optim=adamw_finetune has one for trained weights"
        )
    if resume is None:
        return TrainState(step=0, tokens=0, models=models, guard=Guard())
    record = megatron.load(resume, run, world, models)
    check_record(record, run, session.dataset.digest, resume)
    return TrainState(step=record["step"], tokens=record["tokens"], models=models, guard=Guard.of_record(record))


def _run_steps(session: Session, state: TrainState, stop: Callable[[], int]) -> tuple[TrainState, int]:
    run, world, dataset = session.run, session.world, session.dataset
    if run.guard.rolls_back and not complete_checkpoints(session.checkpoints):
        _save(session, state)  # a way back from the first steps
    while True:
        with (
            closing(batches(run, world, dataset, state.step, state.guard.shift)) as source,
            observing(run, world, session.output_dir, session.console, state.step) as observers,
        ):
            state, end = fold(
                state,
                source,
                step=make_step(run, world),
                evaluate=make_evaluate(run, world, dataset),
                observers=(*observers, _checkpointing(session)),
                stop=stop,
                pulse=session.pulse,
            )
        if end.fault is None:
            return state, end.signal
        state = _recover(session, state, end.fault)


def _recover(session: Session, state: TrainState, fault: Metrics) -> TrainState:
    """The last checkpoint with the data up to the fault behind it. Collective.

    Raises: TrainingError where the fault is to end the run.
    """
    found = {"event": fault.fault, "loss": fault.loss, "grad_norm": fault.grad_norm, "response": fault.response}
    if fault.response == "stop":
        _note(session, state, found)
        raise stopped(
            session.run.guard, state.guard, fault.fault, step=fault.step, loss=fault.loss, grad_norm=fault.grad_norm
        )
    path = complete_checkpoints(session.checkpoints)[-1]
    record = megatron.load(path, session.run, session.world, state.models)
    step, then = record["step"], Guard.of_record(record)
    _note(session, state, found | {"to": step})
    session.console.print(f"step {fault.step}: {fault.fault}; back to step {step}, past the data up to here")
    guard = rolled_back(state.guard, state.step, then, step)
    return TrainState(step=step, tokens=record["tokens"], models=state.models, guard=guard)


def _note(session: Session, state: TrainState, event: dict[str, Any]) -> None:
    if session.world.rank == 0:
        where = {"step": state.step + 1, "batch": state.step + state.guard.shift}
        note_event(session.output_dir, where | event)


def _checkpointing(session: Session) -> Observer:
    interval, last = session.run.checkpoint.interval, session.run.train.steps

    def observe(state: TrainState, _: Metrics) -> None:
        if interval and state.step % interval == 0 and state.step != last:
            _save(session, state)

    return observe


def _save_last(session: Session, state: TrainState, *, stopped: bool) -> None:
    wanted = stopped or session.run.checkpoint.save_at_end
    if wanted and not checkpoint_path(session.checkpoints, state.step).exists():
        _save(session, state)


def _save(session: Session, state: TrainState) -> None:
    record = run_record(session.run, session.dataset.digest, state.step, state.tokens)
    record |= {"guard": asdict(state.guard)}
    session.pulse.mark(state.step, "saving")
    path = checkpoint_path(session.checkpoints, state.step)
    megatron.save(path, session.run, session.world, state.models, record)
    if session.world.rank == 0:
        prune(session.checkpoints, session.run.checkpoint.keep_last)


def _opening(session: Session, models: Models, resume: Path | None) -> str:
    run, world, dataset = session.run, session.world, session.dataset
    source = resume or run.init.hf or "random weights"
    return (
        f"{run.model.family}, {run.model.num_parameters:,} parameters from {source}; {world.world_size} "
        f"rank{'s' * (world.world_size > 1)} on {world.device.type} ({models.impl}); {dataset.description}"
    )


def _show_results(session: Session, state: TrainState, *, stopped: bool) -> None:
    run, output_dir, console = session.run, session.output_dir, session.console
    records = read_records(output_dir / METRICS)
    if run.log.curve and records:
        draw_curve(records, output_dir / CURVE, f"{run.model.family}, {run.model.num_parameters:,} parameters")
    if stopped:
        path = checkpoint_path(session.checkpoints, state.step)
        console.print(
            f"stopped after step {state.step}, saved {path}; the same command with this output directory goes on"
        )
        return
    console.print(f"results: {output_dir}", highlight=False, soft_wrap=True)
    tokenizer = session.dataset.tokenizer
    if not run.checkpoint.export_hf or not run.log.sample_prompt or tokenizer is None:
        return
    if run.model.num_parameters > LARGEST:
        console.print(f"no sample of a model this large; `python -m mbfn.generate hf={output_dir / EXPORT}` makes one")
        return
    prompt, tokens = run.log.sample_prompt, run.log.sample_tokens
    text = sample(output_dir / EXPORT, tokenizer.files[0], prompt, tokens=tokens, seed=run.train.seed)
    console.print(f"transformers reads {output_dir / EXPORT} and continues:", highlight=False, soft_wrap=True)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
