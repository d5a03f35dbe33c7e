"""Batches as pure functions of the configuration and the step, whatever the layout and whatever ran before."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mbfn.config.run import RunConfig
from mbfn.data.dataset import Split
from mbfn.data.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

    Batch = tuple[Mapping[str, Tensor], ...]


def read_batch(split: Split, run: RunConfig, number: int, dp_rank: int) -> Batch:
    """The micro-batches that data-parallel replica `dp_rank` accumulates for global batch `number` (from 0).

    Shapes: num_microbatches of tokens, labels, position_ids int64 and loss_mask float32
    (micro_batch_size, seq_length), with cu_seqlens (N + 1,) int32 where rows are packed.
    """
    return micro_batches(split.read(replica_rows(run, number, dp_rank)), run)


def replica_rows(run: RunConfig, number: int, dp_rank: int) -> NDArray[np.int64]:
    """The numbers of the rows that a replica reads of a global batch, micro-batch after micro-batch."""
    size, micro = run.train.global_batch_size, run.train.micro_batch_size
    rows = number * size + np.arange(size)
    return rows.reshape(run.num_microbatches, run.parallel.data_parallel_size, micro)[:, dp_rank].reshape(-1)


def micro_batches(rows: Rows, run: RunConfig) -> Batch:
    """A replica's rows as the tensors of its micro-batches."""
    import torch

    def cut(values: NDArray[np.generic]) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.ascontiguousarray(values)).split(run.train.micro_batch_size)

    fields = {name: cut(getattr(rows, name)) for name in ("tokens", "labels", "loss_mask", "position_ids")}
    if rows.segments is not None:
        bounds = (list(accumulate(lengths, initial=0)) for lengths in rows.segments)
        fields["cu_seqlens"] = tuple(torch.tensor(row, dtype=torch.int32) for row in bounds)
    return tuple(dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True))
