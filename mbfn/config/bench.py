"""What a measurement of speed does: `bench=true` and the `benchmark` fields."""

from __future__ import annotations

from dataclasses import dataclass

from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """`bench=true` runs these steps on new random tokens instead of the training; nothing is saved but the figures."""

    warmup_steps: int = 3  # before the clock: compilation, allocation, autotuning
    steps: int = 10  # timed; the median counts
    profile: bool = True  # one more step under torch's profiler, for where its time goes
    ceiling: bool = True  # time matrix products alone first, for what the device reaches at best

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.warmup_steps >= 1, "warmup_steps", f"expected at least 1, got {self.warmup_steps}", problems)
        require(self.steps >= 1, "steps", f"expected at least 1, got {self.steps}", problems)
        if problems:
            raise ConfigError(problems)
