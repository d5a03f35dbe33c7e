"""The optimizer: the `optim` group, and the learning-rate schedule: the `schedule` group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamRule:
    """Multipliers for the weights whose name fits `pattern`. Those of all rules that a weight fits are multiplied."""

    pattern: str  # of Megatron's names, with * and ?: embedding.*, output_layer.*, decoder.layers.0.*, *.mlp.*
    lr_mult: float = 1.0  # of the learning rate
    wd_mult: float = 1.0  # of the weight decay

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(bool(self.pattern), "pattern", "expected a weight's name, such as embedding.*", problems)
        for name in ("lr_mult", "wd_mult"):
            value = getattr(self, name)
            require(value >= 0, name, f"expected at least 0, got {value}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonConfig:
    """Muon: the momentum of a matrix, orthogonalised. Embeddings, output layer, norms and biases keep AdamW."""

    momentum: float = 0.95
    nesterov: bool = False
    num_ns_steps: int = 5  # of the Newton-Schulz iteration
    coefficient_type: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    extra_scale_factor: float = 1.0  # 0.2 with spectral: steps as large as AdamW's, so that its lr fits
    split_qkv: bool = True  # queries, keys and values as three matrices
    tp_mode: Literal["duplicated", "distributed", "blockwise"] = "duplicated"  # blockwise: each rank's share alone
    fp32_matmul_prec: Literal["highest", "high", "medium"] = "medium"  # medium: the iteration in bf16

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(0 <= self.momentum < 1, "momentum", f"expected in [0, 1), got {self.momentum}", problems)
        require(self.num_ns_steps >= 1, "num_ns_steps", f"expected at least 1, got {self.num_ns_steps}", problems)
        positive = self.extra_scale_factor > 0
        require(positive, "extra_scale_factor", f"expected above 0, got {self.extra_scale_factor}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimizer as Megatron-core runs it. `lr` is the peak that the schedule scales."""

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.1  # apart from the gradient for AdamW and Muon, part of it for SGD
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    sgd_momentum: float = 0.9
    muon: MuonConfig = MuonConfig()
    decay_norms_and_biases: bool = False  # weight decay on vectors too
    rules: tuple[ParamRule, ...] = ()  # learning rate and decay of some weights
    clip_grad: float = 1.0  # global gradient norm; 0 leaves gradients as they are
    loss_scale: float | None = None  # fp16: a constant one; none: as large as gradients allow
    initial_loss_scale: float = 65536.0  # of the dynamic scale
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000  # steps without overflow after which the scale doubles
    hysteresis: int = 2  # overflows before it halves
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass runs
    overlap_param_gather: bool = False  # gather parameters while the forward pass runs
    optimizer_offload_fraction: float = 0.0  # share of optimizer state that lives, and is updated, on the CPU
    overlap_cpu_optimizer_d2h_h2d: bool = False  # update it while gradients and weights are on their way

    def __post_init__(self) -> None:
        problems = _range_problems(self)
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "overlap_param_gather",
            "needs overlap_grad_reduce=true",
            problems,
        )
        require(
            not self.overlap_param_gather or self.optimizer == "adamw",
            "overlap_param_gather",
            f"is there for optimizer=adamw, got {self.optimizer}; set it to false",
            problems,
        )
        require(
            not self.optimizer_offload_fraction or self.optimizer == "adamw",
            "optimizer_offload_fraction",
            f"is there for optimizer=adamw, got {self.optimizer}; set it to 0",
            problems,
        )
        require(
            not self.overlap_cpu_optimizer_d2h_h2d or self.optimizer_offload_fraction > 0,
            "overlap_cpu_optimizer_d2h_h2d",
            "needs optimizer_offload_fraction above 0",
            problems,
        )
        if problems:
            raise ConfigError(problems)

    @property
    def scales_loss(self) -> bool:
        """Whether any field of loss scaling is other than its default."""
        plain = OptimConfig()
        return any(getattr(self, name) != getattr(plain, name) for name in LOSS_SCALING)


LOSS_SCALING = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def _range_problems(optim: OptimConfig) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    for name in ("beta1", "beta2", "sgd_momentum"):
        value = getattr(optim, name)
        require(0 <= value < 1, name, f"expected in [0, 1), got {value}", problems)
    for name in ("weight_decay", "eps", "clip_grad"):
        value = getattr(optim, name)
        require(value >= 0, name, f"expected at least 0, got {value}", problems)
    for name in ("lr", "loss_scale", "initial_loss_scale", "min_loss_scale"):
        value = getattr(optim, name)
        require(value is None or value > 0, name, f"expected above 0, got {value}", problems)
    for name in ("loss_scale_window", "hysteresis"):
        value = getattr(optim, name)
        require(value >= 1, name, f"expected at least 1, got {value}", problems)
    share = optim.optimizer_offload_fraction
    require(0 <= share <= 1, "optimizer_offload_fraction", f"expected in [0, 1], got {share}", problems)
    smallest = optim.min_loss_scale
    text = f"{smallest} is above initial_loss_scale={optim.initial_loss_scale}"
    require(smallest <= optim.initial_loss_scale, "min_loss_scale", text, problems)
    return problems


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
