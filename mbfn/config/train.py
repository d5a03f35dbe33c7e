"""The run itself: how long, how much a step, from which weights; `checkpoint`, `log` and `launch` groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One optimizer step sees `global_batch_size` sequences of `seq_length` tokens."""

    steps: int = 100
    global_batch_size: int = 16
    micro_batch_size: int = 4
    seq_length: int = 256
    seed: int = 1234
    eval_interval: int = 25  # steps between evaluations; 0: none
    eval_batches: int = 2  # global batches of held-out text an evaluation

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name in ("steps", "global_batch_size", "micro_batch_size", "seq_length", "eval_batches"):
            value = getattr(self, name)
            require(value >= 1, name, f"expected at least 1, got {value}", problems)
        require(self.eval_interval >= 0, "eval_interval", f"expected at least 0, got {self.eval_interval}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Where the first weights come from."""

    hf: str | None = None  # a Hugging Face directory; none: random, by train.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What the run leaves in its output directory, and how it continues."""

    interval: int = 0  # steps between checkpoints; 0: only at the end and on SIGTERM or SIGUSR1
    keep_last: int = 2
    save_at_end: bool = True
    export_hf: bool = True  # a Hugging Face directory of the final weights
    resume: Literal["auto", "never"] = "auto"  # auto: the last complete checkpoint of the output directory, if any

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.interval >= 0, "interval", f"expected at least 0, got {self.interval}", problems)
        require(self.keep_last >= 1, "keep_last", f"expected at least 1, got {self.keep_last}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What the user sees."""

    progress: bool = True  # a live bar on a terminal, plain lines elsewhere
    interval: int = 1  # steps between records of metrics.jsonl
    curve: bool = True  # the loss curve as curve.png
    sample_prompt: str = "The "  # continued by the trained model at the end; empty: nothing
    sample_tokens: int = 48
    debug_checks: bool = False  # chex assertions on the shapes and dtypes of every batch and metric

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.interval >= 1, "interval", f"expected at least 1, got {self.interval}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How the ranks start.

    `auto`: the ranks that torchrun or srun started, else this process alone; `local`: that many processes here.
    """

    kind: Literal["auto", "local"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    timeout_s: int = 1800  # a collective that waits longer ends the run

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.timeout_s >= 1, "timeout_s", f"expected at least 1, got {self.timeout_s}", problems)
        if problems:
            raise ConfigError(problems)
