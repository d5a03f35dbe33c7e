"""The kernels of the update and of SwiGLU: their values, and that they compile to wide loads."""

from __future__ import annotations

import pytest
import triton

from mbfn.megatron import adam_kernel, swiglu_kernel
from tests.megatron.triton_kernels import check_interpreted, compiled

_WIDE = ("ld.global.v4.b32", "st.global.v4.b32")  # 16 bytes
_FLOATS = ("clip", "lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2")


@pytest.mark.parametrize("name", ["adam", "optimizer", "swiglu"])
def test_values_are_those_of_plain_torch(name: str) -> None:
    check_interpreted("tests.megatron.kernel_values", name)


@pytest.mark.parametrize("master", ["none", "remainder", "fp32"])
def test_adam_compiles_to_loads_of_16_bytes(master: str) -> None:
    half, whole = triton.language.bfloat16, triton.language.float32
    constants = dict.fromkeys(("GRAD", "EXP_AVG", "EXP_AVG_SQ"), half) | {"WEIGHT": whole if master == "none" else half}
    constants |= {"MASTER": master, "ALIGNED": True, "BLOCK": adam_kernel.BLOCK, "COLUMNS": 6}
    arguments = {"table": "*i64", "blocks": "*i32"} | dict.fromkeys(_FLOATS, "fp32")
    ptx = compiled(adam_kernel._adamw, arguments, constants, warps=adam_kernel.WARPS).asm["ptx"]
    assert all(wide in ptx for wide in _WIDE)


def test_swiglu_compiles_to_loads_of_16_bytes() -> None:
    arguments = {"grad": "*bf16", "inputs": "*bf16", "out": "*bf16", "width": "i32 * 16"}
    constants, warps = {"BLOCK": swiglu_kernel.BLOCK}, swiglu_kernel.WARPS
    ptx = compiled(swiglu_kernel._swiglu_back, arguments, constants, warps=warps).asm["ptx"]
    assert all(wide in ptx for wide in _WIDE)
    arguments |= {"weights": "*fp32", "by_weight": "*fp32"}
    ptx = compiled(swiglu_kernel._weighted_swiglu_back, arguments, constants, warps=warps).asm["ptx"]
    assert all(wide in ptx for wide in _WIDE)
