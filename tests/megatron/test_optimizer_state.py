"""A bf16 weight and its remainder are an fp32 weight, exactly."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mbfn.megatron.optimizer_state import join_master, master_remainder


@given(arrays.arrays("float32", st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(deadline=None)
def test_a_weight_is_its_rounding_and_the_remainder(values: object) -> None:
    master = torch.as_tensor(values)
    remainder = master_remainder(master)
    bits = master.view(torch.int32) - remainder.to(torch.int32)
    assert (bits & 0xFFFF).eq(0).all()
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(join_master(rounded, remainder).view(torch.int32), master.view(torch.int32))
    tie = remainder == -(2**15)  # the one case where torch rounds to even and Transformer Engine away from zero
    assert torch.equal(rounded[~tie], master.bfloat16()[~tie])
