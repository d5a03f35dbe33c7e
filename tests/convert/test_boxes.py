"""Boxes of stored tensors against slices of padded ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mbfn.convert.plans import box_plan
from mbfn.convert.states import gather


@given(st.data())
def test_a_box_is_the_slice_and_zero_outside(data: st.DataObject) -> None:
    """Also where it begins or ends beyond the tensor, as rows of a vocabulary that is padded further do."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    offset = tuple(data.draw(st.integers(0, size + 1)) for size in shape)
    box = tuple(data.draw(st.integers(1, 4)) for _ in shape)
    source = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)
    larger = torch.zeros([max(n, a + b) for n, a, b in zip(shape, offset, box, strict=True)], dtype=source.dtype)
    larger[tuple(slice(n) for n in shape)] = source
    plan = box_plan("t", shape, offset, box)
    wanted = larger[tuple(slice(a, a + b) for a, b in zip(offset, box, strict=True))]
    assert torch.equal(gather(plan, {"t": source}), wanted)
    assert plan.padding == int((wanted == 0).sum())
