"""Plans of copies as streams: any stretch of a planned tensor, read from its sources when it is written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mbfn.convert.copies import TensorPlan, window
from mbfn.convert.states import dtype_of, fill
from mbfn.storage.hf_write import Streamed
from mbfn.storage.streams import Read


def streamed(plan: TensorPlan, source: Mapping[str, Tensor]) -> Streamed:
    """The planned tensor, to be read piece by piece from `source`; it is never whole in memory."""
    return Streamed(shape=plan.shape, dtype=dtype_of(source, plan.like), read=reader(plan, source))


def reader(plan: TensorPlan, source: Mapping[str, Tensor]) -> Read:
    """`read(start, stop, out)` for a stretch of the flattened planned tensor."""
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
