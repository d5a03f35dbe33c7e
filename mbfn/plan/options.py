"""What `python -m mbfn.plan` takes: a run, and what to ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.config.run import RunConfig
from mbfn.errors import ConfigError, require
from mbfn.plan.devices import DeviceName


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig(RunConfig):
    """A run as `python -m mbfn.train` takes it, and the questions."""

    device: DeviceName = "h100"  # the GPU that it runs on
    tokens: float | None = None  # of the whole training, for the days; none: those of train.steps
    search: bool = False  # list the layouts that fit, fastest first
    gpus: int | None = None  # that search lays out; none: those of the layout given
    top: int = 10  # layouts that search lists
    out: str | None = None  # a directory for memory.png and pipeline.png
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        try:
            RunConfig.__post_init__(self)  # a slots dataclass has no super() of its own
        except ConfigError as error:
            problems += error.problems
        for name in ("tokens", "gpus", "top"):
            value = getattr(self, name)
            require(value is None or value > 0, name, f"expected above 0, got {value}", problems)
        if problems:
            raise ConfigError(problems)
