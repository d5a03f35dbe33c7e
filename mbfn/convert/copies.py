"""Strided block copies: what every conversion, import, export and reshard is made of.

A `Copy` moves a box of elements between two contiguous tensors: element `i = (i0, i1, ...)` of the box goes from flat
position `src_offset + sum(i * src_strides)` of the source to `dst_offset + sum(i * dst_strides)` of the target. The
inverse of a copy swaps the two sides; cutting a tensor for a rank, a file chunk or a buffer is `window`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Side = Literal["src", "dst"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A box of `shape` elements from tensor `source` to the tensor that owns the copy. Units: elements."""

    source: str
    shape: Shape
    src_offset: int
    src_strides: Shape
    dst_offset: int
    dst_strides: Shape

    @property
    def numel(self) -> int:
        """Elements that the copy moves."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one tensor is made: elements that no copy writes are zero (vocabulary padding)."""

    name: str
    shape: Shape
    copies: tuple[Copy, ...]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def padding(self) -> int:
        """Elements that no copy writes."""
        return self.numel - sum(copy.numel for copy in self.copies)


def inverse(copy: Copy, target: str) -> Copy:
    """The same elements the other way: from `target`, the tensor that owned `copy`, to its source."""
    return Copy(target, copy.shape, copy.dst_offset, copy.dst_strides, copy.src_offset, copy.src_strides)


def coalesce(copy: Copy) -> Copy:
    """The same copy with the fewest axes: size-1 axes dropped, axes that both sides run through merged."""
    axes: list[tuple[int, int, int]] = []
    for size, src, dst in zip(copy.shape, copy.src_strides, copy.dst_strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == src * size and axes[-1][2] == dst * size:
            axes[-1] = (axes[-1][0] * size, src, dst)
        else:
            axes.append((size, src, dst))
    shape, src_strides, dst_strides = zip(*axes, strict=True) if axes else ((), (), ())
    return Copy(copy.source, shape, copy.src_offset, src_strides, copy.dst_offset, dst_strides)


def window(copy: Copy, side: Side, shape: Shape, start: Shape, stop: Shape) -> Iterator[Copy]:
    """The part of `copy` inside the box `[start, stop)` of its `side` tensor of `shape`, which becomes a tensor itself.

    Offsets and strides of that side then count in the contiguous tensor of shape `stop - start`. Yields none when the
    box and the copy share nothing, several copies when a range starts or ends inside an inner axis.
    """
    dims = [d for d, size in enumerate(shape) if size > 1]
    old = _contiguous(shape)
    new = _contiguous(tuple(b - a for a, b in zip(start, stop, strict=True)))
    if any(b <= a for a, b in zip(start, stop, strict=True)):
        return
    offset, strides = (copy.src_offset, copy.src_strides) if side == "src" else (copy.dst_offset, copy.dst_strides)
    owner = [next((d for d in dims if old[d] <= stride), -1) for stride in strides]
    choices, rebased = [], [0] * len(strides)
    for d in dims:
        axes = [a for a, o in enumerate(owner) if o == d and copy.shape[a] > 1]
        axes.sort(key=lambda a: -strides[a])
        for a in axes:
            rebased[a] = strides[a] // old[d] * new[d]
        steps = [(copy.shape[a], strides[a] // old[d]) for a in axes]
        base = offset // old[d] % shape[d]
        boxes = _range_boxes(steps, start[d] - base, stop[d] - base)
        choices.append([(base - start[d], new[d], axes, box) for box in boxes])
    for choice in itertools.product(*choices):
        yield _boxed(copy, side, rebased, choice)


def _boxed(copy: Copy, side: Side, rebased: list[int], choice: tuple) -> Copy:
    """`copy` restricted on each axis to the ranges of `choice`, its `side` rebased to the window."""
    starts, counts = [0] * len(copy.shape), list(copy.shape)
    position = 0
    for base, unit, axes, box in choice:
        position += base * unit
        for axis, (first, count) in zip(axes, box, strict=True):
            starts[axis], counts[axis] = first, count
            position += first * rebased[axis]
    other = copy.dst_strides if side == "src" else copy.src_strides
    moved = sum(first * stride for first, stride in zip(starts, other, strict=True))
    shape = tuple(counts)
    if side == "src":
        part = replace(copy, shape=shape, src_offset=position, src_strides=tuple(rebased))
        return coalesce(replace(part, dst_offset=copy.dst_offset + moved))
    part = replace(copy, shape=shape, dst_offset=position, dst_strides=tuple(rebased))
    return coalesce(replace(part, src_offset=copy.src_offset + moved))


def _range_boxes(steps: list[tuple[int, int]], low: int, high: int) -> list[list[tuple[int, int]]]:
    """Boxes of the nested axes `steps` [(size, stride)], outermost first, whose position lies in `[low, high)`."""
    if not steps:
        return [[]] if low <= 0 < high else []
    (size, stride), inner = steps[0], steps[1:]
    extent = 1 + sum((n - 1) * s for n, s in inner)  # positions an index of this axis reaches over
    whole = [(0, n) for n, _ in inner]
    full_from = min(max(0, -(-low // stride)), size)
    full_to = max(min(size, (high - extent) // stride + 1), full_from)
    boxes: list[list[tuple[int, int]]] = []
    for index in range(max(0, (low - extent) // stride + 1), full_from):
        boxes += [[(index, 1), *box] for box in _range_boxes(inner, low - index * stride, high - index * stride)]
    if full_to > full_from:
        boxes.append([(full_from, full_to - full_from), *whole])
    for index in range(full_to, min(size, -(-high // stride))):
        boxes += [[(index, 1), *box] for box in _range_boxes(inner, low - index * stride, high - index * stride)]
    return boxes


def _contiguous(shape: Shape) -> Shape:
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return tuple(strides)
