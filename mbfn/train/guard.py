"""Judging steps: a fault is a pure function of the losses so far, so a resumed run judges as the first one did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from mbfn.config.guard import GuardConfig, OnFault
from mbfn.errors import TrainingError
from mbfn.megatron import World
from mbfn.megatron.update import Judge

Fault = Literal["", "nan", "spike"]
_FAULTS: tuple[Fault, ...] = ("", "nan", "spike")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What judging remembers of the steps before. Part of the state: checkpoints hold it."""

    losses: tuple[float, ...] = ()  # of the last learned steps, at most `spike_window`
    skips: int = 0  # steps skipped since the last learned one
    roll_backs: int = 0  # ways back so far
    shift: int = 0  # batches that they passed over: update number `step` learns from batch `step + shift`

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Guard:
        """The guard of a checkpoint's record; a new one where the checkpoint has none."""
        fields = record.get("guard", {})
        return cls(**{**fields, "losses": tuple(fields.get("losses", ()))})


def find_fault(config: GuardConfig, guard: Guard, loss: float, grad_norm: float | None) -> Fault:
    """What is wrong with a step of this loss and gradient norm (none: not known yet)."""
    if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
        return "nan"
    if config.on_spike == "ignore" or len(guard.losses) < config.spike_window:
        return ""
    mean, deviation = statistics.fmean(guard.losses), statistics.pstdev(guard.losses)
    return "spike" if loss > mean + config.spike_threshold * deviation else ""


def make_judge(config: GuardConfig, guard: Guard, world: World) -> Judge:
    """`find_fault` as an update asks for it. Where spikes matter it is agreed on, for ranks may round a loss apart."""

    def judge(loss: float, grad_norm: float | None) -> str:
        fault = find_fault(config, guard, loss, grad_norm)
        if config.on_spike == "ignore" or world.world_size == 1:
            return fault
        worst = torch.tensor(_FAULTS.index(fault), device=world.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return _FAULTS[int(worst.item())]

    return judge


def learned(config: GuardConfig, guard: Guard, loss: float) -> Guard:
    """The guard after a step that was learned from."""
    kept = (*guard.losses, loss)[-config.spike_window :] if config.on_spike != "ignore" else ()
    return replace(guard, losses=kept, skips=0)


def response(config: GuardConfig, guard: Guard, fault: str) -> OnFault:
    """What to do about a fault: as the configuration says, until it has happened too often."""
    wanted = config.on_nan if fault == "nan" else config.on_spike
    if wanted == "skip":
        return "skip" if guard.skips < config.max_skips else "stop"
    if wanted == "roll_back":
        return "roll_back" if guard.roll_backs < config.max_roll_backs else "stop"
    return "stop"


def rolled_back(now: Guard, step: int, then: Guard, restored: int) -> Guard:
    """The guard with which the run goes on from checkpoint `restored` after a fault in the update that follows `step`.

    The checkpoint's own losses, and a shift by which the next batch is the one after the batch at fault.
    """
    return replace(then, roll_backs=now.roll_backs + 1, shift=step + now.shift + 1 - restored)


def stopped(
    config: GuardConfig, guard: Guard, fault: str, *, step: int, loss: float, grad_norm: float
) -> TrainingError:
    """The error that ends the run, in one line."""
    field, wanted = ("on_nan", config.on_nan) if fault == "nan" else ("on_spike", config.on_spike)
    if math.isfinite(loss) and fault == "nan":
        what = f"the gradient norm of step {step} is {grad_norm}"
    elif fault == "nan":
        what = f"the loss of step {step} is {loss}"
    else:
        mean = statistics.fmean(guard.losses)
        what = f"the loss of step {step} is {loss:.4f}, that of the {len(guard.losses)} steps before {mean:.4f}"
    often = {"skip": f" after {guard.skips} skipped steps", "roll_back": f" after {guard.roll_backs} ways back"}
    advice = "" if wanted == "roll_back" else f"; guard.{field}=roll_back goes past the data of such steps"
    return TrainingError(f"guard.{field}: {wanted}{often.get(wanted, '')}: {what}; no weights have taken it up{advice}")
