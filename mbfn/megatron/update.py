"""One update of the weights, made only where loss and gradient pass a judgement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from mbfn.megatron.adam import clip_update, gather_update
from mbfn.megatron.device import attributes

Judge = Callable[[float, float | None], str]  # loss, gradient norm once it is known -> the fault; empty: none


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What became of a gradient."""

    done: bool  # whether the weights changed
    grad_norm: float  # of the whole gradient, before clipping; NaN where it was not computed
    fault: str = ""  # why the gradient was refused; overflow of fp16 is none, its scaler deals with that


def no_fault(loss: float, grad_norm: float | None) -> str:
    """Every gradient passes."""
    del loss, grad_norm
    return ""


def update(optimizer: MegatronOptimizer, loss: float, judge: Judge) -> Update:
    """Step the optimizer unless `judge` finds a fault: then weights and moments stay bit for bit as they are.

    Collective. `judge` sees the loss first and the norm before the update; it must say the same on every rank.
    """
    if fault := judge(loss, None):
        return Update(done=False, grad_norm=math.nan, fault=fault)
    norms: list[float] = []
    faults: list[str] = []
    measure, clip, apply = optimizer.get_grad_norm, optimizer.clip_grad_norm, optimizer.step_with_ready_grads

    def get_grad_norm() -> float:
        found = measure()
        gather_update(optimizer)
        norms.append(float(found))  # waits for the device
        return norms[-1]

    def clip_grad_norm(max_norm: float) -> float:  # what one optimizer calls in place of the above, a chain of them not
        norms.append(float(clip(max_norm)))
        return norms[-1]

    def step_with_ready_grads() -> bool:
        norm = norms[-1] if norms else get_grad_norm()
        faults.append(judge(loss, norm))
        if faults[-1]:
            return False
        clip_update(optimizer, norm)
        return apply()

    gates: dict[str, Any] = {
        "get_grad_norm": get_grad_norm,
        "clip_grad_norm": clip_grad_norm,
        "step_with_ready_grads": step_with_ready_grads,
    }
    with attributes(optimizer, gates):
        done, *_ = optimizer.step()
    return Update(done=done, grad_norm=norms[-1] if norms else math.nan, fault=faults[-1] if faults else "")
