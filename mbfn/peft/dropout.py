"""Dropout that a resumed run draws as the run did that was not stopped."""

from __future__ import annotations

import torch

from mbfn.config.adapters import adapters_of
from mbfn.config.run import RunConfig
from mbfn.megatron.weights import stream_of
from mbfn.megatron.world import World


def seed_dropout(run: RunConfig, world: World, batch: int) -> None:
    """Seed torch's random numbers for global batch number `batch`, where an adapter draws any.

    Tensor-parallel ranks draw alike: with whole sequences they must drop the same inputs.
    """
    if any(adapter.spec.dropout for adapter in adapters_of(run.model, run.peft)):
        place = world.coordinates
        torch.manual_seed(stream_of(run.train.seed, f"dropout/{batch}/{place.dp}/{place.cp}/{place.pp}"))
