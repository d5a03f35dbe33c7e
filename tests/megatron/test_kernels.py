"""Kernels in Triton without a GPU: their values by the interpreter, and that they compile for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mbfn.megatron import adam_kernel, swiglu_kernel

HOPPER = GPUTarget("cuda", 90, 32)
_FLOATS = ("clip", "lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2")


@pytest.mark.parametrize("name", ["adam", "swiglu"])
def test_values_are_those_of_plain_torch(name: str) -> None:
    command = [sys.executable, "-m", "tests.megatron.kernel_values", name]
    root = Path(__file__).parents[2]
    made = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.strip() == f"passed {name}"


@pytest.mark.parametrize("master", ["none", "remainder", "fp32"])
def test_adam_compiles_to_loads_of_16_bytes(master: str) -> None:
    weight = "fp32" if master == "none" else "bf16"
    formats = dict(zip(("WEIGHT", "GRAD", "EXP_AVG", "EXP_AVG_SQ"), (weight, "bf16", "bf16", "bf16"), strict=True))
    constants = {
        name: {"bf16": triton.language.bfloat16, "fp32": triton.language.float32}[of] for name, of in formats.items()
    }
    constants |= {"MASTER": master, "ALIGNED": True, "BLOCK": adam_kernel.BLOCK, "COLUMNS": 6}
    signature = (
        {"table": "*i64", "blocks": "*i32"} | dict.fromkeys(_FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    )
    ptx = _ptx(adam_kernel._adamw, signature, constants, warps=adam_kernel.WARPS)
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx


def test_swiglu_compiles_to_loads_of_16_bytes() -> None:
    tensors = ("grad", "inputs", "out")
    signature = {**dict.fromkeys(tensors, "*bf16"), "width": "i32", "BLOCK": "constexpr"}
    ptx = _ptx(swiglu_kernel._swiglu_back, signature, {"BLOCK": swiglu_kernel.BLOCK}, warps=4, even=(0, 1, 2, 3))
    assert "ld.global.v4.b32" in ptx
    signature = {"grad": "*bf16", "inputs": "*bf16", "weights": "*fp32", "out": "*bf16", "by_weight": "*fp32"}
    signature |= {"width": "i32", "BLOCK": "constexpr"}
    kernel = swiglu_kernel._weighted_swiglu_back
    assert "ld.global" in _ptx(kernel, signature, {"BLOCK": 512}, warps=4, even=(0, 1, 3, 5))


def _ptx(kernel: object, signature: dict, constants: dict, *, warps: int, even: tuple[int, ...] = ()) -> str:
    """What a kernel becomes for Hopper, the arguments `even` being multiples of 16."""
    attributes = {(at,): [["tt.divisibility", 16]] for at in even}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm["ptx"]
