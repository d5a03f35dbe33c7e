"""Operations a token against figures that others print."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mbfn.config.compose import compose
from mbfn.plan.flops import token_flops


@pytest.mark.parametrize(
    ("name", "seq_length", "causal", "full"),
    [  # GFLOP: Megatron Bridge and our measurements; NVIDIA's DGX Cloud benchmarks
        ("llama32_1b", 8192, 9.03, 10.64),
        ("llama31_8b", 8192, 51.47, 57.9),
        ("llama31_8b", 4096, 48.25, 51.47),
        ("llama3_70b", 8192, 449.2, 481.4),
        ("llama31_405b", 8192, 2524, 2625),
    ],
)
def test_published_figures(name: str, seq_length: int, causal: float, full: float) -> None:
    flops = token_flops(compose(f"model={name}").model, seq_length)
    assert (flops.causal / 1e9, flops.full / 1e9) == pytest.approx((causal, full), rel=1e-3)


def test_a_window_bounds_the_context() -> None:
    model = compose("model=llama31_8b").model
    whole = token_flops(model, 8192)
    windowed = token_flops(replace(model, window_size=1024), 8192)
    half = token_flops(replace(model, window_size=1024, window_layers=tuple(range(16))), 8192)
    mean = 1024 - 1024 * 1023 / 2 / 8192  # keys that a query meets
    assert windowed.attention / whole.attention == pytest.approx(mean / 4096)
    assert half.attention == pytest.approx((windowed.attention + whole.attention) / 2)
    assert token_flops(replace(model, window_size=8192), 8192) == whole
