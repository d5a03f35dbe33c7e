"""Laws of sharing out a checkpoint: stretches of a flat tensor as boxes, boxes among ranks, sums of joined bytes."""

from __future__ import annotations

import math
import zlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbfn.megatron.sharded import boxes_in_range, divide
from mbfn.storage.sums import joined_crc


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Part of a contiguous tensor whose elements are their own places."""
    sizes = draw(st.lists(st.integers(1, 6), max_size=3))
    view = torch.arange(math.prod(sizes)).view(sizes)
    for axis, size in enumerate(sizes):
        start = draw(st.integers(0, size - 1))
        view = view.narrow(axis, start, draw(st.integers(1, size - start)))
    return view


@given(views(), st.integers(0, 220), st.integers(0, 220))
@settings(deadline=None)
def test_boxes_hold_each_element_of_a_stretch_once(view: Tensor, start: int, stop: int) -> None:
    found: list[int] = []
    boxes = list(boxes_in_range(view.shape, view.stride(), int(view.storage_offset()), start, stop))
    for offset, shape in boxes:
        part = view
        for axis, (at, size) in enumerate(zip(offset, shape, strict=True)):
            part = part.narrow(axis, at, size)
        found += part.flatten().tolist()
    assert sorted(found) == [place for place in sorted(view.flatten().tolist()) if start <= place < stop]
    if view.is_contiguous():
        assert len(boxes) <= max(1, 2 * view.dim() - 1)


@given(st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 100)), min_size=1, max_size=5))
@settings(deadline=None)
def test_every_box_falls_to_one_of_its_holders(drawn: list[dict[int, int]]) -> None:
    sizes = {number: size for own in drawn for number, size in own.items()}  # holders of a box agree in its size
    holdings = [{(str(number), ()): sizes[number] for number in own} for own in drawn]
    shares = divide(holdings)
    assert sorted(ident for share in shares for ident in share) == sorted({i for own in holdings for i in own})
    assert all(share <= own.keys() for share, own in zip(shares, holdings, strict=True))


def test_replicas_share_the_bytes_evenly() -> None:
    own = {(f"layer {number}", (0,)): 1000 - number for number in range(40)}
    loads = [sum(own[ident] for ident in share) for share in divide([own, own, own, own])]
    assert max(loads) - min(loads) < 1000


@given(st.binary(max_size=50), st.binary(max_size=300), st.integers(0, 40))
@settings(deadline=None)
def test_the_sum_of_joined_bytes(first: bytes, second: bytes, times: int) -> None:
    tail = second * times
    assert joined_crc(zlib.crc32(first), zlib.crc32(tail), len(tail)) == zlib.crc32(first + tail)
