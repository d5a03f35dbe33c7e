"""Plans of copies as streams: any stretch of a planned tensor, read from its sources when it is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mbfn.convert.copies import TensorPlan, window
from mbfn.convert.states import dtype_of, fill, one_dtype
from mbfn.storage.hf_write import Streamed
from mbfn.storage.streams import Read


def streamed(plan: TensorPlan, source: Mapping[str, Tensor]) -> Streamed:
    """The planned tensor, to be read piece by piece from `source`; it is never whole in memory."""
    return Streamed(shape=plan.shape, dtype=dtype_of(source, plan.like), read=reader(plan, source))


def reader(plan: TensorPlan, source: Mapping[str, Tensor], *, cast: torch.dtype | None = None) -> Read:
    """`read(start, stop, out)` for a stretch of the flattened planned tensor, on request in another dtype."""
    dtype = one_dtype(plan, source) if cast else None
    if dtype != cast and dtype is not None:
        return _casting(reader(plan, source), dtype)
    numel, padded = plan.numel, plan.padding > 0

    def read(start: int, stop: int, out: Tensor) -> None:
        if padded:
            out.zero_()
        if (start, stop) == (0, numel):
            fill(plan, source, out)
            return
        parts = (part for copy in plan.copies for part in window(copy, "dst", (numel,), (start,), (stop,)))
        fill(TensorPlan(plan.name, (stop - start,), tuple(parts), plan.like), source, out)

    return read


def _casting(read: Read, dtype: torch.dtype) -> Read:
    def cast(start: int, stop: int, out: Tensor) -> None:
        own = torch.empty(stop - start, dtype=dtype)
        read(start, stop, own)
        out.copy_(own)

    return cast
