"""What a step takes and gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbfn.megatron import Models


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainState:
    """A moment of a run. Megatron updates `models` in place, so a state is used once: by the step that replaces it."""

    step: int  # updates done
    tokens: int  # tokens learned from
    models: Models


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What one update showed. Equal on every rank but for the time it took."""

    step: int  # updates done, this one included
    loss: float  # mean over the tokens of the global batch
    grad_norm: float
    lr: float
    tokens: int  # tokens learned from since the first step
    skipped: bool = False  # gradients overflowed, weights are as before
    valid_loss: float | None = None  # where an evaluation was due
    seconds: float = 0.0  # wall time of the update and its evaluation
    tokens_per_s: float = 0.0

    def record(self) -> dict[str, float | int | bool | None]:
        """The metrics as a JSON object: figures that are not finite become null, absent ones are left out."""
        fields = {
            "step": self.step,
            "loss": _finite(self.loss),
            "grad_norm": _finite(self.grad_norm),
            "lr": self.lr,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }
        extra = {"skipped": True} if self.skipped else {}
        return fields | extra | ({} if self.valid_loss is None else {"valid_loss": _finite(self.valid_loss)})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
