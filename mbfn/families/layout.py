"""How a tensor is laid out over named axes: the language of the weight rules.

A layout is a tuple with one entry a dimension. An entry is an axis name (`"hidden"`), a tuple of entries (their
product, outer to inner), a `Cat` (labelled blocks one after the other) or a `Pad` (an axis with unused places at its
end). So Megatron's fused QKV weight, by query group, is

    ("group", Cat(q=("rep", "head_dim"), k="head_dim", v="head_dim")), "hidden"

Two tensors that hold the same named axes hold the same weights; `locate` gives the strides that say where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

type Dim = str | tuple[Dim, ...] | Cat | Pad
type Layout = tuple[Dim, ...]
type Sizes = Mapping[str, int]
type Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, init=False)
class Cat:
    """Blocks one after the other, each with the label of the weights it holds."""

    blocks: tuple[tuple[str, Dim], ...]

    def __init__(self, **blocks: Dim) -> None:
        object.__setattr__(self, "blocks", tuple(blocks.items()))


@dataclass(frozen=True, slots=True)
class Pad:
    """`axis` in the first places of a dimension as long as the axis `padded`."""

    axis: str
    padded: str


@dataclass(frozen=True, slots=True)
class Location:
    """Where labelled weights lie in a contiguous tensor: a flat offset, and a stride for each named axis."""

    offset: int
    strides: Mapping[str, int]


def dim_size(dim: Dim, sizes: Sizes) -> int:
    """Length of a dimension."""
    match dim:
        case str():
            return sizes[dim]
        case Pad():
            return sizes[dim.padded]
        case Cat():
            return sum(dim_size(block, sizes) for _, block in dim.blocks)
    return math.prod(dim_size(part, sizes) for part in dim)


def shape_of(layout: Layout, sizes: Sizes) -> Shape:
    """The tensor's shape."""
    return tuple(dim_size(dim, sizes) for dim in layout)


def labels_of(dim: Dim | Layout) -> tuple[str, ...]:
    """Labels of the blocks in a layout; a layout without `Cat` has none."""
    match dim:
        case str() | Pad():
            return ()
        case Cat():
            return tuple(label for label, _ in dim.blocks)
    return tuple(label for part in dim for label in labels_of(part))


def locate(layout: Layout, label: str, sizes: Sizes) -> Location:
    """Where the weights `label` lie in a tensor of `layout`; a layout without `Cat` has one kind, of any label."""
    strides: dict[str, int] = {}
    offset = _descend(layout, label, sizes, 1, strides)
    return Location(offset, strides)


def _descend(dim: Dim | Layout, label: str, sizes: Sizes, unit: int, strides: dict[str, int]) -> int:
    """Note the strides of `label`'s axes below `dim`, whose innermost step is `unit` elements; return their offset."""
    match dim:
        case str():
            strides[dim] = unit
            return 0
        case Pad():
            strides[dim.axis] = unit
            return 0
        case Cat():
            before = 0
            for name, block in dim.blocks:
                if name == label:
                    return before * unit + _descend(block, label, sizes, unit, strides)
                before += dim_size(block, sizes)
            raise KeyError(label)
    offset = 0
    for part in reversed(dim):
        offset += _descend(part, label, sizes, unit, strides)
        unit *= dim_size(part, sizes)
    return offset
