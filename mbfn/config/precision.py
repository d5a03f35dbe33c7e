"""Number formats of every tensor kind: the `precision` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.config.model import Dtype
from mbfn.errors import ConfigError, require

Fp8Recipe = Literal["none", "delayed", "tensorwise", "blockwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """Formats of parameters, gradients, optimizer state and matrix products."""

    params: Dtype = "fp32"  # parameters and activations
    grads: Dtype = "fp32"  # the accumulated and reduced gradient
    main_params: Dtype = "fp32"  # the optimizer's master weights
    exp_avg: Dtype = "fp32"  # Adam's first moment
    exp_avg_sq: Dtype = "fp32"  # Adam's second moment
    fp8: Fp8Recipe = "none"  # matrix products in FP8 through Transformer Engine
    fp8_amax_history_len: int = 16  # steps that the delayed recipe looks back

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        fp8 = self.fp8 != "none"
        require(
            not fp8 or self.params == "bf16",
            "params",
            f"fp8={self.fp8} needs bf16 parameters, got {self.params}",
            problems,
        )
        require(
            self.params != "fp32" or {self.grads, self.main_params, self.exp_avg, self.exp_avg_sq} == {"fp32"},
            "params",
            "fp32 parameters need fp32 grads, main_params, exp_avg and exp_avg_sq",
            problems,
        )
        if problems:
            raise ConfigError(problems)

    @property
    def precision_aware(self) -> bool:
        """Whether the optimizer keeps any state below fp32."""
        return {self.main_params, self.exp_avg, self.exp_avg_sq} != {"fp32"}
