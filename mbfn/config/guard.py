"""The `guard` group: what happens at a step whose loss or gradient is not a number, or whose loss jumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require

OnFault = Literal["stop", "skip", "roll_back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """A step is judged after its backward pass and before its update, so that weights never take up a fault.

    `stop` ends the run with an error; `skip` leaves weights and optimizer as they were and goes on with the next batch;
    `roll_back` goes back to the last checkpoint and passes over every batch from there to the one at fault.
    """

    on_nan: OnFault = "stop"  # the loss or the gradient norm is NaN or infinite
    on_spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"  # the loss is far above those before it
    spike_threshold: float = 6.0  # standard deviations above the mean of the window
    spike_window: int = 64  # learned steps that a loss is compared with; none is a spike before there are as many
    max_skips: int = 10  # steps skipped in a row before the run stops after all
    max_roll_backs: int = 3  # ways back in a whole run before it stops after all

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        threshold = self.spike_threshold
        require(threshold > 0, "spike_threshold", f"expected more than 0, got {threshold}", problems)
        for name, least in (("spike_window", 2), ("max_skips", 1), ("max_roll_backs", 1)):
            value = getattr(self, name)
            require(value >= least, name, f"expected at least {least}, got {value}", problems)
        if problems:
            raise ConfigError(problems)

    @property
    def rolls_back(self) -> bool:
        """Whether a fault may send the run back to a checkpoint."""
        return "roll_back" in (self.on_nan, self.on_spike)
