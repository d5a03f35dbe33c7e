"""Layouts of named axes against torch's own reshapes."""

from __future__ import annotations

import pytest
import torch

from mbfn.families.layout import Cat, Layout, Pad, labels_of, locate, shape_of

SIZES = {"g": 2, "r": 3, "d": 5, "h": 7, "v": 9, "v_pad": 12}


def view(layout: Layout, label: str, axes: str) -> torch.Tensor:
    """The weights `label` of a numbered tensor of `layout`, over `axes` in the given order."""
    shape = shape_of(layout, SIZES)
    numbered = torch.arange(torch.Size(shape).numel())
    place = locate(layout, label, SIZES)
    return numbered.as_strided([SIZES[a] for a in axes], [place.strides[a] for a in axes], place.offset)


def test_fused_qkv_by_query_group() -> None:
    layout: Layout = (("g", Cat(q=("r", "d"), k="d", v="d")), "h")
    whole = torch.arange(2 * 5 * 5 * 7).reshape(2, 5, 5, 7)  # (g, r + 2, d, h)
    assert shape_of(layout, SIZES) == (50, 7)
    assert labels_of(layout) == ("q", "k", "v")
    assert torch.equal(view(layout, "q", "grdh"), whole[:, :3])
    assert torch.equal(view(layout, "k", "gdh"), whole[:, 3])
    assert torch.equal(view(layout, "v", "gdh"), whole[:, 4])


def test_interleaved_rows_are_a_cat_of_single_places() -> None:
    layout: Layout = (("r", Cat(gate=(), up=())), "h")
    whole = torch.arange(3 * 2 * 7).reshape(6, 7)
    assert torch.equal(view(layout, "gate", "rh"), whole[0::2])
    assert torch.equal(view(layout, "up", "rh"), whole[1::2])


def test_transposed_and_padded() -> None:
    assert torch.equal(view(("h", "v"), "", "vh"), torch.arange(63).reshape(7, 9).T)
    padded: Layout = (Pad("v", "v_pad"), "h")
    assert shape_of(padded, SIZES) == (12, 7)
    assert torch.equal(view(padded, "", "vh"), torch.arange(12 * 7).reshape(12, 7)[:9])


def test_blocks_of_unequal_length() -> None:
    layout: Layout = (Cat(z="v", x="r", dt=()), "h")
    whole = torch.arange(13 * 7).reshape(13, 7)
    assert torch.equal(view(layout, "x", "rh"), whole[9:12])
    assert torch.equal(view(layout, "dt", "h"), whole[12])


def test_unknown_label() -> None:
    with pytest.raises(KeyError, match="w"):
        locate((Cat(q="d", k="d"),), "w", SIZES)
