"""Which samples share a row. Pure: lengths in, bins out; each sample in exactly one bin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mbfn.data.rows import padded

Packing = Literal["none", "in_order", "ffd"]


@dataclass(frozen=True, slots=True, eq=False)
class Bins:
    """Bin b holds `items[bounds[b]:bounds[b + 1]]`, in that order."""

    items: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        return self.items[self.bounds[number] : self.bounds[number + 1]]


def packed(lengths: NDArray[np.int64], capacity: int, packing: Packing, *, multiple: int = 1) -> Bins:
    """Items 0, 1, ... of these lengths in bins of `capacity`, each rounded up to `multiple`.

    `in_order` fills one bin after the other. `ffd` takes the longest first and puts each into the first bin with room.
    """
    sizes = padded(np.asarray(lengths, dtype=np.int64), multiple)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"an item of {sizes.max()} is larger than a bin of {capacity}")
    if packing == "none":
        return Bins(np.arange(len(sizes)), np.arange(len(sizes) + 1))
    return _in_order(sizes, capacity) if packing == "in_order" else _first_fit_decreasing(sizes, capacity)


def _in_order(sizes: NDArray[np.int64], capacity: int) -> Bins:
    ends, bounds = np.cumsum(sizes), [0]
    while (start := bounds[-1]) < len(sizes):
        taken = ends[start - 1] if start else 0
        bounds.append(int(np.searchsorted(ends, taken + capacity, side="right")))
    return Bins(np.arange(len(sizes)), np.asarray(bounds))


def _first_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> Bins:
    """All items of one size at once: bins with room take as many as fit, first bins first, as one by one would."""
    order = np.argsort(-sizes, kind="stable")
    bin_of, room, bins = np.empty(len(sizes), dtype=np.int64), np.empty(len(sizes), dtype=np.int64), 0
    edges = np.flatnonzero(np.diff(sizes[order], prepend=-1, append=-1))
    for start, stop in pairwise(edges):
        size, count = int(sizes[order[start]]), int(stop - start)
        fits = np.flatnonzero(room[:bins] >= size) if size else np.arange(min(bins, 1))
        holds = room[fits] // size if size else np.full(len(fits), count)
        taken = np.diff(np.minimum(np.cumsum(holds), count), prepend=0)
        left, each = count - int(taken.sum()), capacity // size if size else count
        new = -(-left // each)
        fits, taken = np.append(fits, np.arange(bins, bins + new)), np.append(taken, np.full(new, each))
        room[bins : bins + new], bins = capacity, bins + new
        if new:
            taken[-1] -= new * each - left
        bin_of[order[start:stop]] = np.repeat(fits, taken)
        room[fits] -= taken * size
    items = order[np.argsort(bin_of[order], kind="stable")]
    return Bins(items, np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=bins))]).astype(np.int64))
