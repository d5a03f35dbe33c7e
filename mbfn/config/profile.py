"""The `profile` group: a few steps of some ranks under a profiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """`torch`: a Chrome trace; `nsight`: NVTX ranges between cudaProfilerStart and -Stop; `memory`: CUDA allocations.

    Files go to `profile/` in the run directory.
    """

    kind: Literal["none", "torch", "nsight", "memory"] = "none"
    start: int = 10  # the first step of the window, later than what the first steps set up
    steps: int = 3
    ranks: tuple[int, ...] = (0,)
    shapes: bool = True  # shapes of the operators' inputs
    stack: bool = False  # Python stacks of operators and ranges; slows the window down

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name in ("start", "steps"):
            value = getattr(self, name)
            require(value >= 1, name, f"expected at least 1, got {value}", problems)
        ranks = self.ranks
        require(bool(ranks) and min(ranks, default=0) >= 0, "ranks", f"expected ranks, got {list(ranks)}", problems)
        if problems:
            raise ConfigError(problems)

    @property
    def last(self) -> int:
        """The last step of the window."""
        return self.start + self.steps - 1
