"""What matrix products alone reach on this device: the ceiling that utilisation is measured against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_REPEATS = 10
_SIZES = {"cuda": 8192, "cpu": 1024}


def matmul_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a square product of random matrices, in `dtype` and, where the device has it, in FP8."""
    size = _SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    found = {str(dtype).removeprefix("torch."): _rate(lambda: a @ b, size, device)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        product = torch._scaled_mm
        found["fp8"] = _rate(
            lambda: product(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), size, device
        )
    return found


def _rate(run: Callable[[], object], size: int, device: torch.device) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        synchronize(device)
        before = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
