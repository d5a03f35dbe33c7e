"""Strided copies against the same move done by indexing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mbfn.convert.copies import Copy, coalesce, contiguous_strides, embed, inverse, window

sizes = st.integers(1, 4)


@st.composite
def qkv_like(draw: st.DrawFn) -> tuple[Copy, tuple[int, int]]:
    """Queries of shape (G*R*D, H) into rows [q.. k v] of a (G*(R+2)*D, H) tensor; axes merged at random."""
    g, r, d, h = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
    slots, first = r + 2, draw(st.integers(0, 2))
    copy = Copy("q", (g, r, d, h), 0, (r * d * h, d * h, h, 1), first * d * h, (slots * d * h, d * h, h, 1))
    return (coalesce(copy) if draw(st.booleans()) else copy), (g * slots * d, h)


def run(copy: Copy, source: Tensor, target: Tensor) -> None:
    part = source.reshape(-1).as_strided(copy.shape, copy.src_strides, copy.src_offset)
    target.view(-1).as_strided(copy.shape, copy.dst_strides, copy.dst_offset).copy_(part)


def numbered(copy: Copy) -> Tensor:
    return torch.arange(1, copy.numel + 1)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return start, tuple(draw(st.integers(a + 1, size)) for a, size in zip(start, shape, strict=True))


@given(st.data())
def test_window_is_the_slice(data: st.DataObject) -> None:
    copy, shape = data.draw(qkv_like())
    (a, x), (b, y) = data.draw(boxes(shape))
    source, whole = numbered(copy), torch.zeros(shape, dtype=torch.int64)
    run(copy, source, whole)
    cut = torch.zeros((b - a, y - x), dtype=torch.int64)
    parts = list(window(copy, "dst", shape, (a, x), (b, y)))
    for part in parts:
        run(part, source, cut)
    assert torch.equal(cut, whole[a:b, x:y])
    assert sum(part.numel for part in parts) == int((whole[a:b, x:y] > 0).sum())


@given(st.data())
def test_embed_puts_the_tensor_into_a_larger_one(data: st.DataObject) -> None:
    copy, shape = data.draw(qkv_like())
    at = (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
    into = tuple(size + offset + data.draw(st.integers(0, 2)) for size, offset in zip(shape, at, strict=True))
    source = numbered(copy)
    small, large = torch.zeros(shape, dtype=torch.int64), torch.zeros(into, dtype=torch.int64)
    run(copy, source, small)
    run(embed(copy, "dst", shape, into, at), source, large)
    assert torch.equal(large[at[0] : at[0] + shape[0], at[1] : at[1] + shape[1]], small)
    assert int((large > 0).sum()) == copy.numel


@given(qkv_like())
def test_inverse_brings_the_elements_back(case: tuple[Copy, tuple[int, int]]) -> None:
    copy, shape = case
    source, target = numbered(copy), torch.zeros(shape, dtype=torch.int64)
    run(copy, source, target)
    back = torch.zeros_like(source)
    run(inverse(copy, "qkv"), target, back)
    assert torch.equal(back, source)


@given(qkv_like())
def test_coalesce_moves_the_same_elements_with_no_more_axes(case: tuple[Copy, tuple[int, int]]) -> None:
    copy, shape = case
    source = numbered(copy)
    before, after = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    run(copy, source, before)
    merged = coalesce(copy)
    run(merged, source, after)
    assert torch.equal(before, after)
    assert len(merged.shape) <= len(copy.shape)
    assert coalesce(merged) == merged


@given(st.lists(st.integers(1, 5), max_size=4))
def test_contiguous_strides_are_torchs(shape: list[int]) -> None:
    assert contiguous_strides(tuple(shape)) == torch.empty(shape).stride()
