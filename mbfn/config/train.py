"""The run itself: how long, how much a step, from which weights; `checkpoint`, `log` and `launch` groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require

Recompute = Literal["none", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One optimizer step sees `global_batch_size` sequences of `seq_length` tokens."""

    steps: int = 400
    global_batch_size: int = 8
    micro_batch_size: int = 4
    seq_length: int = 128
    recompute: Recompute = "none"  # activations made again in the backward pass: full keeps only each layer's input
    seed: int = 1234
    eval_interval: int = 50  # steps between evaluations; 0: none
    eval_batches: int = 4  # global batches of held-out text an evaluation

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
    sample_prompt: str = "The"  # continued by the trained model at the end; empty: nothing
    sample_tokens: int = 80
    debug_checks: bool = False  # chex assertions on the shapes and dtypes of every batch and metric

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.interval >= 1, "interval", f"expected at least 1, got {self.interval}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How the ranks start.

    `auto`: the ranks that torchrun or srun started, else this process alone; `local`: that many processes here;
    `slurm`: a job of a Slurm cluster, with the fields from `time_min` on and those of the `site` group.
    """

    kind: Literal["auto", "local", "slurm"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    timeout_s: int = 1800  # a collective that waits longer ends the run
    time_min: int = 240  # time limit of one start of the job
    signal_s: int = 180  # before that limit the run is told to save; longer than the longest step and save together
    max_requeues: int = 20  # new starts after a time limit, a preemption or a lost node; 0: never
    dependency: str = ""  # as sbatch takes it: afterok:ID, afterany:ID, singleton
    job_name: str = "mbfn"
    poll_s: float = 5.0  # seconds between two questions about the job
    detach: bool = False  # come back as soon as the job is in the queue
    dry_run: bool = False  # print the batch script, submit nothing

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name, least in (("timeout_s", 1), ("time_min", 1), ("signal_s", 1), ("max_requeues", 0)):
            value = getattr(self, name)
            require(value >= least, name, f"expected at least {least}, got {value}", problems)
        require(self.poll_s > 0, "poll_s", f"expected more than 0, got {self.poll_s}", problems)
        limit = 60 * self.time_min
        text = f"{self.signal_s} s leave nothing of time_min={self.time_min}; expected less than {limit}"
        require(self.signal_s < limit, "signal_s", text, problems)
        require("\n" not in self.dependency + self.job_name, "job_name", "expected one line", problems)
        if problems:
            raise ConfigError(problems)
