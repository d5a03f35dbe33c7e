"""What one and two H200s showed: plain Megatron-core 0.19.2 with Transformer Engine 2.20, bf16 gradients and moments.

Step times are medians; peaks are `max_memory_allocated`. Llama-3.1-8B and Llama-3.2-1B shapes, random tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mbfn.config.compose import compose
from mbfn.config.run import RunConfig
from mbfn.plan.activations import Kernels

_MODELS = {"8b": "llama31_8b", "1b": "llama32_1b"}
_OVERLAP = ("optim.overlap_grad_reduce=true", "optim.overlap_param_gather=true")
_TP2 = ("parallel=tp2",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One benchmark."""

    name: str
    model: str
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    step_ms: float
    peak_gib: float
    precision: str = "bf16"
    overrides: tuple[str, ...] = ()
    kernels: Kernels = field(default_factory=Kernels)

    def run(self) -> RunConfig:
        """The same run as a configuration."""
        return compose(
            f"model={_MODELS[self.model]}",
            f"precision={self.precision}",
            "precision.grads=bf16",
            "precision.exp_avg=bf16",
            "precision.exp_avg_sq=bf16",
            f"train.seq_length={self.seq_length}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.global_batch_size={self.global_batch_size}",
            *self.overrides,
        )


def _row(name: str, shape: tuple[str, int, int, int], step_ms: float, peak_gib: float, **more: object) -> Row:
    model, seq_length, micro, batch = shape
    return Row(
        name=name,
        model=model,
        seq_length=seq_length,
        micro_batch_size=micro,
        global_batch_size=batch,
        step_ms=step_ms,
        peak_gib=peak_gib,
        **more,  # type: ignore[arg-type]
    )


_8B, _8B2, _1B = ("8b", 8192, 1, 4), ("8b", 8192, 1, 8), ("1b", 8192, 1, 8)
ROWS = (
    _row("8b", _8B, 2977.7, 114.3),
    _row("8b-tensorwise", _8B, 2191.3, 121.8, precision="fp8_tensorwise"),
    _row("8b-blockwise", _8B, 2403.8, 122.0, precision="fp8_blockwise"),
    _row("8b-delayed", _8B, 2147.7, 122.8, precision="fp8_delayed"),
    _row("8b-recompute", _8B, 3856.1, 82.3, overrides=("train.recompute=full",)),
    _row("8b-4096-mbs2", ("8b", 4096, 2, 8), 2765.8, 114.3),
    _row("8b-4096", ("8b", 4096, 1, 4), 1455.8, 95.3),
    _row("1b", _1B, 1174.4, 25.5),
    _row("1b-mbs4", ("1b", 8192, 4, 8), 1141.3, 65.2),
    _row("1b-tensorwise", _1B, 1001.1, 25.8, precision="fp8_tensorwise"),
    _row("1b-blockwise", _1B, 1056.9, 25.8, precision="fp8_blockwise"),
    _row("8b-tp2", _8B2, 3333.9, 57.3, overrides=_TP2),
    _row("8b-tp2-tensorwise", _8B2, 2553.4, 61.0, overrides=_TP2, precision="fp8_tensorwise"),
    _row("8b-pp2", _8B2, 3460.1, 72.4, overrides=("parallel=pp2",)),
    _row("8b-pp2vpp2", _8B2, 3332.6, 81.1, overrides=("parallel=pp2", "parallel.vpp=2")),
    _row("8b-dp2", _8B2, 3014.9, 91.9, overrides=("parallel=dp2", *_OVERLAP)),
)
MEMORY_ONLY = (  # their times differ by what the planner does not model
    _row("8b-grads-fp32", _8B, 0, 129.3, overrides=("precision.grads=fp32",)),
    _row("1b-swiglu-unfused", _1B, 0, 29.5, kernels=Kernels(fused_swiglu=False)),
    _row("1b-loss-native", _1B, 0, 31.3, kernels=Kernels(cross_entropy="native")),
    _row("1b-loss-unfused", _1B, 0, 27.4, kernels=Kernels(cross_entropy="none")),
    _row("1b-no-accumulation", _1B, 0, 24.8, kernels=Kernels(gradient_accumulation_fusion=False)),
)
