"""Number formats of every tensor kind: the `precision` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.config.model import Dtype
from mbfn.errors import ConfigError, require

Fp8Recipe = Literal["none", "auto", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"]
Fp8Attention = Literal["none", "dot_product"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """Formats of parameters, gradients, optimizer state, matrix products and attention."""

    params: Dtype = "fp32"  # parameters and activations
    grads: Dtype = "fp32"  # the accumulated and reduced gradient
    main_params: Dtype = "fp32"  # the optimizer's master weights
    exp_avg: Dtype = "fp32"  # Adam's first moment
    exp_avg_sq: Dtype = "fp32"  # Adam's second moment
    fp8: Fp8Recipe = "none"  # the layers' matrix products in FP8, nvfp4: in FP4; auto: what suits the GPU best
    fp8_amax_history_len: int = 16  # steps that the delayed recipe looks back
    fp8_attention: Fp8Attention = "none"  # the two products inside attention too
    fp8_output_proj: bool = False  # the output layer's product too; else it is of the parameters' format
    fp8_param_gather: bool = False  # the layers' weights kept, and gathered, in FP8: half the bytes, no casts
    activation_func_fp8_input_store: bool = False  # SwiGLU keeps its input in FP8 for the backward pass
    num_layers_at_start_in_bf16: int = 0  # first layers whose products stay in bf16
    num_layers_at_end_in_bf16: int = 0  # last layers whose products stay in bf16

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(
            not self.quantized or self.params == "bf16",
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
        problems += _recipe_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def quantized(self) -> bool:
        """Whether matrix products run below 16 bits."""
        return self.fp8 != "none"

    @property
    def precision_aware(self) -> bool:
        """Whether the optimizer keeps any state below fp32."""
        return {self.main_params, self.exp_avg, self.exp_avg_sq} != {"fp32"}


def _recipe_problems(precision: PrecisionConfig) -> list[tuple[str, str]]:
    """What a recipe cannot be combined with on any device."""
    problems: list[tuple[str, str]] = []
    recipe, attention = precision.fp8, precision.fp8_attention
    plain = PrecisionConfig.__dataclass_fields__
    for name in ("fp8_attention", "fp8_output_proj", "fp8_param_gather", "activation_func_fp8_input_store"):
        unused = getattr(precision, name) == plain[name].default
        require(unused or precision.quantized, name, "needs an FP8 recipe; set fp8=auto, or leave it out", problems)
    text = "the blockwise recipe has no attention in FP8; use tensorwise or delayed"
    require(recipe != "blockwise" or attention == "none", "fp8_attention", text, problems)
    fits = recipe not in ("delayed", "nvfp4")
    text = f"needs fp8=tensorwise, blockwise or mxfp8, got {recipe}"
    require(fits or not precision.fp8_output_proj, "fp8_output_proj", text, problems)
    require(fits or not precision.fp8_param_gather or recipe == "delayed", "fp8_param_gather", text, problems)
    text = f"weights kept in FP8 need main_params=fp32, got {precision.main_params}"
    require(not precision.fp8_param_gather or precision.main_params == "fp32", "fp8_param_gather", text, problems)
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(precision, name)
        require(count >= 0, name, f"expected at least 0, got {count}", problems)
        text = f"needs an FP8 recipe other than delayed, got {recipe}"
        require(not count or recipe not in ("none", "delayed"), name, text, problems)
    return problems
