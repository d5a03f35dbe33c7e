"""What a measurement of speed does: `bench=true` and the `benchmark` fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbfn.errors import ConfigError, require

if TYPE_CHECKING:
    from mbfn.config.run import RunConfig

PACKING_UNIT = 64  # lengths of packed samples are multiples of it


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """`bench=true` runs these steps on new random tokens instead of the training; nothing is saved but the figures."""

    warmup_steps: int = 3  # before the clock: compilation, allocation, autotuning
    steps: int = 10  # timed; the median counts
    profile: bool = True  # one more step under torch's profiler, for where its time goes
    packed_samples: int = 0  # samples of random lengths in each row, which do not see each other; 0: whole rows
    ceiling: bool = True  # time matrix products alone first, for what the device reaches at best

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.warmup_steps >= 1, "warmup_steps", f"expected at least 1, got {self.warmup_steps}", problems)
        require(self.steps >= 1, "steps", f"expected at least 1, got {self.steps}", problems)
        packed = self.packed_samples
        require(packed >= 0, "packed_samples", f"expected at least 0, got {packed}", problems)
        if problems:
            raise ConfigError(problems)


def benchmark_problems(run: RunConfig) -> list[tuple[str, str]]:
    """What rows of several samples need of the batch."""
    problems: list[tuple[str, str]] = []
    packed, train = run.benchmark.packed_samples, run.train
    if packed:
        size = train.micro_batch_size
        text = f"benchmark.packed_samples makes one row a micro-batch, got {size}; set it to 1"
        require(size == 1, "train.micro_batch_size", text, problems)
        most = train.seq_length // PACKING_UNIT
        text = f"{packed} samples of {PACKING_UNIT} tokens and more do not fit train.seq_length={train.seq_length}"
        require(packed <= most, "benchmark.packed_samples", text, problems)
        fits = train.seq_length % PACKING_UNIT == 0
        text = f"expected a multiple of {PACKING_UNIT} with packed samples, got {train.seq_length}"
        require(fits, "train.seq_length", text, problems)
    return problems
