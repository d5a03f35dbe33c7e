"""Reading a strided region of a stored tensor: only its bytes, straight into the target where the layouts agree."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from mbfn.convert.copies import Copy, coalesce
from mbfn.errors import CheckpointError

MAX_READ = 1 << 30  # bytes of one call: Linux moves at most 2 GiB
SCRATCH = 4 << 20  # bytes that a staged read holds
SMALL_RUN = 512  # bytes below which a call costs more than the gap to the next run
type Way = Literal["one", "scattered", "runs", "staged"]
"""How a region is read: in one call; in one call for many places; run by run; through a scratch tensor."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BUFFERS = 512  # of one scattered read: Linux takes at most 1024
WASTE = 1.1  # bytes read for a byte wanted, at most, unless the runs are small


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """Where a contiguous stored tensor (or one chunk of it) lies; known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int


class ShapeAndDtype(Protocol):
    """What is known of a stored tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class RegionSource(Protocol):
    """A store that can hand out a region of a tensor without reading the rest."""

    def __getitem__(self, name: str, /) -> Tensor:
        """The whole tensor."""
        ...

    def meta(self, name: str) -> ShapeAndDtype:
        """Shape and dtype, without reading."""
        ...

    def read_into(self, copy: Copy, out: Tensor) -> None:
        """Carry out `copy`, whose source is a tensor name of this store, into the contiguous tensor `out`."""
        ...


def pread_exactly(fd: int, count: int, offset: int, path: Path) -> bytes:
    """`count` bytes at `offset`.

    Raises: CheckpointError when the file ends before.
    """
    found = os.pread(fd, count, offset)
    if len(found) != count:
        raise CheckpointError(f"{path}: cut short: expected {count} bytes at {offset}, found {len(found)}")
    return found


def read_region(fd: int, meta: TensorMeta, copy: Copy, out: Tensor) -> None:
    """Carry out `copy` from the stored tensor at `meta` into the contiguous tensor `out` of the same dtype.

    Bytes read: those of the region, at most `WASTE` times as many where nearby runs are read in one go; the whole
    span where the runs are shorter than `SMALL_RUN`.
    Raises: CheckpointError when the file is cut; ValueError when the copy leaves either tensor.
    """
    _check(meta, copy, out)
    if copy.numel == 0:
        return
    copy = by_source(copy)
    way = way_of(copy, meta.dtype.itemsize) if out.device.type == "cpu" else "staged"
    if way == "scattered":
        _read_scattered(fd, meta, copy, out)
    elif way == "staged":
        for part in _split(copy, SCRATCH // meta.dtype.itemsize):
            _read_staged(fd, meta, part, out)
    else:
        _read_runs(fd, meta, copy, out)


def way_of(copy: Copy, itemsize: int) -> Way:
    """How a region whose axes are `by_source` is read."""
    unit = copy.src_strides[-1:] in ((), (1,)) and copy.dst_strides[-1:] in ((), (1,))
    if len(copy.shape) <= 1 and unit:
        return "one"
    if not unit or copy.shape[-1] * itemsize < SMALL_RUN:
        return "staged"
    return "scattered" if span(copy.shape, copy.src_strides) == copy.numel else "runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a region takes: how it is read, in how many runs of how many bytes, and the bytes asked of the file."""

    way: Way
    runs: int
    run: int
    nbytes: int


def cost_of(copy: Copy, itemsize: int) -> Cost:
    """What `read_region` does for `copy`, without a file."""
    copy = by_source(copy)
    way = way_of(copy, itemsize)
    run = copy.shape[-1] * itemsize if copy.src_strides[-1:] == (1,) else itemsize
    nbytes = copy.numel * itemsize
    if way == "staged":
        parts = _split(copy, SCRATCH // itemsize)
        nbytes = sum(itemsize * (_extent(part, itemsize) or part.numel) for part in parts)
    return Cost(way=way, runs=max(1, copy.numel * itemsize // run), run=run, nbytes=nbytes)


def by_source(copy: Copy) -> Copy:
    """The same copy with its axes in the order of the source and as few as possible."""
    order = sorted(range(len(copy.shape)), key=lambda axis: -copy.src_strides[axis])
    shape, src, dst = (tuple(sizes[a] for a in order) for sizes in (copy.shape, copy.src_strides, copy.dst_strides))
    return coalesce(replace(copy, shape=shape, src_strides=src, dst_strides=dst))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a box, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _check(meta: TensorMeta, copy: Copy, out: Tensor) -> None:
    if not out.is_contiguous() or out.dtype != meta.dtype:
        raise ValueError(f"{copy.source}: expected a contiguous {meta.dtype} target, got {out.dtype}, {out.stride()}")
    if copy.numel == 0:
        return
    src = copy.src_offset + span(copy.shape, copy.src_strides)
    dst = copy.dst_offset + span(copy.shape, copy.dst_strides)
    if copy.src_offset < 0 or src > math.prod(meta.shape) or copy.dst_offset < 0 or dst > out.numel():
        raise ValueError(f"{copy}: leaves its source of shape {meta.shape} or its target of shape {tuple(out.shape)}")


def _read_runs(fd: int, meta: TensorMeta, copy: Copy, out: Tensor) -> None:
    """One read for each contiguous run, straight to its place."""
    item = meta.dtype.itemsize
    target = memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())
    run = (copy.shape[-1] if copy.shape else 1) * item
    src_steps = _positions(copy.shape[:-1], copy.src_strides[:-1], meta.offset + copy.src_offset * item, item)
    dst_steps = _positions(copy.shape[:-1], copy.dst_strides[:-1], copy.dst_offset * item, item)
    preadv = os.preadv
    for src, dst in zip(src_steps, dst_steps, strict=True):
        if preadv(fd, (target[dst : dst + min(run, MAX_READ)],), src) != run:
            read_exactly(fd, target[dst : dst + run], src, meta.file)


def _read_scattered(fd: int, meta: TensorMeta, copy: Copy, out: Tensor) -> None:
    """A region without gaps, to runs that lie apart: many of them in one call."""
    item = meta.dtype.itemsize
    target = memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())
    run, position = copy.shape[-1] * item, meta.offset + copy.src_offset * item
    places = _positions(copy.shape[:-1], copy.dst_strides[:-1], copy.dst_offset * item, item)
    for group in itertools.batched(places, max(1, min(BUFFERS, MAX_READ // run))):
        if os.preadv(fd, [target[place : place + run] for place in group], position) != run * len(group):
            for number, place in enumerate(group):
                read_exactly(fd, target[place : place + run], position + number * run, meta.file)
        position += run * len(group)


def read_exactly(fd: int, target: memoryview, offset: int, path: Path) -> None:
    """Fill `target` from `offset` on, in as many calls as it takes."""
    done = 0
    while done < len(target):
        count = os.preadv(fd, (target[done : done + MAX_READ],), offset + done)
        if count == 0:
            raise CheckpointError(f"{path}: cut short: expected {len(target)} bytes at {offset}, found {done}")
        done += count


def _positions(shape: tuple[int, ...], strides: tuple[int, ...], start: int, item: int) -> Iterator[int]:
    """Byte positions of a box, last axis fastest."""
    if not shape:
        return iter((start,))
    axes = [[index * stride * item for index in range(size)] for size, stride in zip(shape, strides, strict=True)]
    axes[0] = [start + step for step in axes[0]]
    return iter(axes[0]) if len(axes) == 1 else map(sum, itertools.product(*axes))


def _split(copy: Copy, limit: int) -> Iterator[Copy]:
    """Parts of `copy` whose span in the source is at most `limit` elements, if that is more than one element."""
    if span(copy.shape, copy.src_strides) <= limit or copy.numel == 1:
        yield copy
        return
    stride = copy.src_strides[0]
    inner = span(copy.shape[1:], copy.src_strides[1:])
    step = min(copy.shape[0] - 1, max(1, (limit - inner) // stride + 1)) if stride else 1
    for first in range(0, copy.shape[0], step):
        count = min(step, copy.shape[0] - first)
        part = replace(
            copy,
            shape=(count, *copy.shape[1:]),
            src_offset=copy.src_offset + first * stride,
            dst_offset=copy.dst_offset + first * copy.dst_strides[0],
        )
        yield from _split(coalesce(part) if count == 1 else part, limit)


def _read_staged(fd: int, meta: TensorMeta, copy: Copy, out: Tensor) -> None:
    """By way of a scratch tensor: for layouts that differ, runs too short to read one by one, other devices."""
    extent = _extent(copy, meta.dtype.itemsize)
    if extent:
        scratch = torch.empty(extent, dtype=meta.dtype)
        strides = copy.src_strides
        read = Copy(copy.source, (extent,), copy.src_offset, (1,), 0, (1,))
    else:
        scratch = torch.empty(copy.numel, dtype=meta.dtype)
        strides = tuple(math.prod(copy.shape[axis + 1 :]) for axis in range(len(copy.shape)))
        read = replace(copy, dst_offset=0, dst_strides=strides)
    _read_runs(fd, meta, read, scratch)
    bits = BITS[meta.dtype.itemsize]  # not every dtype can be copied with strides
    flat = out.detach().reshape(-1).view(bits)
    target = flat.as_strided(copy.shape, copy.dst_strides, flat.storage_offset() + copy.dst_offset)
    target.copy_(scratch.view(bits).as_strided(copy.shape, strides))


def _extent(copy: Copy, itemsize: int) -> int:
    """Elements that a staged read takes in one stretch; 0 where it goes run by run."""
    extent = span(copy.shape, copy.src_strides)
    runs_are_small = copy.src_strides[-1:] != (1,) or copy.shape[-1] * itemsize < SMALL_RUN
    return extent if extent <= copy.numel * WASTE or runs_are_small else 0
