"""What a step takes and gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mbfn.megatron import Models
    from mbfn.train.guard import Guard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainState:
    """A moment of a run. Megatron updates `models` in place, so a state is used once: by the step that replaces it."""

    step: int  # updates done, skipped ones included
    tokens: int  # tokens learned from
    models: Models
    guard: Guard


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What one update showed. Equal on every rank but for the time it took."""

    step: int  # updates done, this one included
    loss: float  # mean over the tokens of the global batch
    grad_norm: float
    lr: float
    tokens: int  # tokens learned from since the first step
    skipped: bool = False  # weights are as before: gradients overflowed, or `fault` says what else
    fault: str = ""  # nan or spike
    response: Literal["", "stop", "skip", "roll_back"] = ""  # to the fault
    terms: Mapping[str, float] = field(default_factory=dict)  # of the loss, by their names
    loss_scale: float | None = None  # what fp16 gradients were multiplied by
    valid_loss: float | None = None  # where an evaluation was due
    seconds: float = 0.0  # wall time of the data, the update and its evaluation
    data_s: float = 0.0  # of that, waiting for the batch
    update_s: float = 0.0  # and for forward, backward and optimizer
    tokens_per_s: float = 0.0
    tflops: float = 0.0  # a second and GPU, of the model
    memory_gb: float = 0.0  # peak so far, of this rank

    def record(self) -> dict[str, float | int | bool | str | None]:
        """The metrics as a JSON object: figures that are not finite become null, absent ones are left out."""
        fields: dict[str, float | int | bool | str | None] = {
            "step": self.step,
            "loss": _finite(self.loss),
            "grad_norm": _finite(self.grad_norm),
            "lr": self.lr,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "data_s": round(self.data_s, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "tflops": float(f"{self.tflops:.4g}"),
            "memory_gb": round(self.memory_gb, 3),
        }
        fields |= {name: _finite(value) for name, value in self.terms.items()}
        fields |= {"skipped": True} if self.skipped else {}
        fields |= {"fault": self.fault} if self.fault else {}
        fields |= {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        if self.valid_loss is None:
            return fields
        return fields | {"valid_loss": _finite(self.valid_loss), "valid_perplexity": _finite(self.valid_perplexity)}

    @property
    def valid_perplexity(self) -> float:
        """Of held-out text, a token: the choice among so many equally likely ones is as hard."""
        try:
            return math.nan if self.valid_loss is None else math.exp(self.valid_loss)
        except OverflowError:
            return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
