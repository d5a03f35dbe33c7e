"""Batches as pure functions of the configuration and the step, whatever the layout and whatever ran before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mbfn.config.run import RunConfig
from mbfn.data.dataset import Dataset
from mbfn.data.order import permuted

if TYPE_CHECKING:
    from torch import Tensor


def train_rows(dataset: Dataset, run: RunConfig, step: int) -> NDArray[np.int64]:
    """The global batch that update number `step` (from 0) learns from, every epoch in an order of its own.

    Shapes: (global_batch_size, seq_length + 1)
    """
    size = run.train.global_batch_size
    samples = step * size + np.arange(size)
    epochs, positions = np.divmod(samples, dataset.train_windows)
    indices = np.empty_like(samples)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permuted(positions[chosen], dataset.train_windows, run.train.seed, int(epoch))
    return dataset.windows(indices)


def valid_rows(dataset: Dataset, run: RunConfig, batch: int) -> NDArray[np.int64]:
    """Held-out batch number `batch`, the same at every evaluation.

    Shapes: (global_batch_size, seq_length + 1)
    """
    size = run.train.global_batch_size
    samples = (batch * size + np.arange(size)) % dataset.valid_windows
    return dataset.windows(dataset.train_windows + samples)


def micro_batches(rows: NDArray[np.int64], run: RunConfig, dp_rank: int) -> tuple[Mapping[str, Tensor], ...]:
    """The micro-batches that data-parallel replica `dp_rank` accumulates for the global batch `rows`.

    Shapes: rows (global_batch_size, seq_length + 1) -> num_microbatches of int64 (micro_batch_size, seq_length)
    """
    import torch

    replicas = run.parallel.data_parallel_size
    own = rows.reshape(run.num_microbatches, replicas, run.train.micro_batch_size, -1)[:, dp_rank]
    tokens = torch.from_numpy(np.ascontiguousarray(own))
    positions = torch.arange(tokens.shape[-1] - 1).expand(tokens.shape[1], -1).contiguous()
    return tuple(
        {
            "tokens": micro[:, :-1].contiguous(),
            "labels": micro[:, 1:].contiguous(),
            "loss_mask": torch.ones_like(positions),
            "position_ids": positions,
        }
        for micro in tokens
    )
