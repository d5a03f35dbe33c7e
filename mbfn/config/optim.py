"""The optimizer: the `optim` group, and the learning-rate schedule: the `schedule` group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW as Megatron-core runs it. `lr` is the peak that the schedule scales."""

    lr: float = 3e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0  # global gradient norm; 0 leaves gradients as they are
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass runs
    overlap_param_gather: bool = False  # gather parameters while the forward pass runs

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.lr > 0, "lr", f"expected above 0, got {self.lr}", problems)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, f"expected in [0, 1), got {value}", problems)
        for name in ("weight_decay", "eps", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, name, f"expected at least 0, got {value}", problems)
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "overlap_param_gather",
            "needs overlap_grad_reduce=true",
            problems,
        )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves. Steps are optimizer steps."""

    decay: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    warmup_steps: int = 0  # linear from 0 to the peak
    decay_steps: int | None = None  # length of the run that the decay is drawn for; none: train.steps
    wsd_decay_steps: int = 0  # length of the final descent of wsd
    min_lr_ratio: float = 0.1  # floor as a share of the peak

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name in ("warmup_steps", "wsd_decay_steps"):
            value = getattr(self, name)
            require(value >= 0, name, f"expected at least 0, got {value}", problems)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", f"expected in [0, 1], got {self.min_lr_ratio}", problems)
        require(
            self.decay != "wsd" or self.wsd_decay_steps > 0, "wsd_decay_steps", "decay=wsd needs at least 1", problems
        )
        if problems:
            raise ConfigError(problems)


def learning_rate(optim: OptimConfig, schedule: ScheduleConfig, steps: int, step: int) -> float:
    """The rate that update number `step` (from 0) of a run of `steps` updates uses; the warm-up's first is not 0."""
    peak, floor = optim.lr, optim.lr * schedule.min_lr_ratio
    total = schedule.decay_steps or steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    if schedule.decay == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(schedule.warmup_steps, 1) / (step + 1)))
    start = total - schedule.wsd_decay_steps if schedule.decay == "wsd" else schedule.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(total - start, 1)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    return floor + (peak - floor) * remaining
