"""Reading a strided region gives what indexing the whole tensor gives, and reads little more than its bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mbfn.convert.copies import Copy, window
from mbfn.errors import CheckpointError
from mbfn.storage import open_hf
from mbfn.storage.regions import SCRATCH, read_region

DTYPES = [torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.float8_e4m3fn]


def arange(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Bytes that differ from place to place."""
    count = math.prod(shape) * dtype.itemsize
    numbers = torch.arange(count, dtype=torch.int64) * 2654435761 % 251
    return numbers.to(torch.uint8).view(dtype).reshape(shape)


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def expected(source: torch.Tensor, copy: Copy, out: torch.Tensor) -> torch.Tensor:
    """The definition of a copy, element by element, on bytes."""
    item = source.dtype.itemsize
    src, dst = source.reshape(-1).view(torch.uint8).view(-1, item), out.clone().reshape(-1).view(torch.uint8)
    dst = dst.view(-1, item)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in (*copy.shape, 1, 1))).tolist():
        at = [sum(i * s for i, s in zip(index, steps, strict=False)) for steps in (copy.src_strides, copy.dst_strides)]
        dst[copy.dst_offset + at[1]] = src[copy.src_offset + at[0]]
    return dst.reshape(-1).view(source.dtype).reshape(out.shape)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Copy]:
    """A shape, and a copy of a box of it to a tensor with the same axes in another order."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    stop = tuple(draw(st.integers(first + 1, size)) for first, size in zip(start, shape, strict=True))
    size = tuple(b - a for a, b in zip(start, stop, strict=True))
    order = draw(st.permutations(range(len(shape))))
    moved = strides(tuple(size[axis] for axis in order))
    dst = tuple(moved[order.index(axis)] for axis in range(len(shape)))
    offset = sum(a * s for a, s in zip(start, strides(shape), strict=True))
    return shape, Copy("t", size, offset, strides(shape), 3, dst)


@settings(max_examples=150, deadline=None)
@given(boxes(), st.sampled_from(DTYPES))
def test_a_region_is_what_the_copy_says(
    tmp_path_factory: pytest.TempPathFactory, box: tuple, dtype: torch.dtype
) -> None:
    shape, copy = box
    file = tmp_path_factory.mktemp("region") / "model.safetensors"
    source = arange(shape, dtype)
    save_file({"before": torch.zeros(3), "t": source}, file)
    out = arange((copy.numel + 5,), dtype)
    want = expected(source, copy, out)
    with open_hf(file) as hf:
        hf.read_into(copy, out)
    assert torch.equal(out.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("start", "stop", "order"),
    [
        ((0, 1024), (700, 2048), (0, 1)),  # a column slice: long runs, straight to their place
        ((0, 8), (3000, 24), (0, 1)),  # a narrow one: runs too short to read one by one
        ((0, 1024), (700, 2048), (1, 0)),  # transposed, gathered through the scratch tensor
        ((0, 0), (3000, 4096), (1, 0)),  # transposed, larger than the scratch tensor
        ((5, 0), (2905, 4096), (0, 1)),  # a row slice: one run
    ],
)
def test_large_regions(tmp_path: Path, dtype: torch.dtype, start: tuple, stop: tuple, order: tuple) -> None:
    source = arange((3000, 4096), dtype)
    assert source.nbytes > 2 * SCRATCH
    save_file({"t": source}, tmp_path / "model.safetensors")
    part = source[start[0] : stop[0], start[1] : stop[1]]
    want = part.permute(order).contiguous()
    dst = tuple(strides(tuple(want.shape))[order.index(axis)] for axis in range(2))
    out = torch.empty(want.shape, dtype=dtype)
    with open_hf(tmp_path) as hf:
        hf.read_into(Copy("t", tuple(part.shape), start[0] * 4096 + start[1], (4096, 1), 0, dst), out)
    assert torch.equal(out.view(torch.uint8), want.view(torch.uint8))


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_slice_costs_its_bytes(tmp_path: Path) -> None:
    source = arange((2048, 8192), torch.bfloat16)
    save_file({"t": source}, tmp_path / "model.safetensors")
    whole = Copy("t", (2048, 8192), 0, (8192, 1), 0, (8192, 1))
    for start, stop in [((0, 3072), (2048, 4096)), ((512, 0), (768, 8192))]:
        shape = (stop[0] - start[0], stop[1] - start[1])
        out = torch.empty(shape, dtype=source.dtype)
        with open_hf(tmp_path) as hf:
            before = bytes_read()
            for copy in window(whole, "dst", (2048, 8192), start, stop):
                hf.read_into(copy, out)
            read = bytes_read() - before
        assert torch.equal(out, source[start[0] : stop[0], start[1] : stop[1]])
        assert out.nbytes <= read <= 1.1 * out.nbytes


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"t": torch.arange(4096)}, file)
    with open_hf(file) as hf, file.open("r+b") as stream:
        stream.truncate(1000)
        with pytest.raises(CheckpointError, match="cut short: expected"):
            hf.read_into(Copy("t", (4096,), 0, (1,), 0, (1,)), torch.empty(4096, dtype=torch.int64))


def test_copies_that_leave_a_tensor_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"s": torch.arange(10), "t": torch.arange(10)}, file)
    with open_hf(file) as hf:
        for copy in [
            Copy("s", (11,), 0, (1,), 0, (1,)),
            Copy("s", (2,), 0, (1,), 9, (1,)),
            Copy("s", (1,), -1, (1,), 0, (1,)),
        ]:
            with pytest.raises(ValueError, match="leaves its source"):
                read_region(-1, hf.meta("s"), copy, torch.zeros(10, dtype=torch.int64))
        with pytest.raises(ValueError, match="expected a contiguous"):
            hf.read_into(Copy("s", (1,), 0, (1,), 0, (1,)), torch.zeros(10))
