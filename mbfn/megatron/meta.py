"""Names, shapes and dtypes of every rank's weights as Megatron itself makes them, without weights, ranks or a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig, coordinates
from mbfn.config.precision import PrecisionConfig
from mbfn.megatron.device import without_cuda
from mbfn.megatron.groups import Ranks, group_ranks, open_groups
from mbfn.megatron.model import LanguageModel, build_chunks
from mbfn.megatron.settings import core_config
from mbfn.megatron.weights import chunk_tensors

TensorShape = tuple[tuple[int, ...], torch.dtype]


def meta_states(
    model: ModelConfig, parallel: ParallelConfig, ranks: Iterable[int] | None = None
) -> Iterator[tuple[int, dict[str, TensorShape]]]:
    """`GPTModel.state_dict()` of each of `ranks` (all, if none) as {name: (shape, dtype)}, in the local naming.

    Every rank's model is built in full, on the meta device under torch's fake process group.
    """
    enumerations = group_ranks(parallel)
    for rank in range(parallel.world_size) if ranks is None else ranks:
        with _fake_world(rank, parallel.world_size):
            chunks = _build(model, parallel, _own(enumerations, rank), coordinates(parallel, rank).pp)
        yield rank, {name: (tuple(t.shape), t.dtype) for name, t in chunk_tensors(chunks).items()}


def _own(enumerations: dict[str, Ranks], rank: int) -> dict[str, Ranks]:
    """The groups that `rank` is in: under a fake process group it need not open those of others."""
    return {name: tuple(group for group in ranks if rank in group) for name, ranks in enumerations.items()}


def _build(
    model: ModelConfig, parallel: ParallelConfig, enumerations: dict[str, Ranks], stage: int
) -> tuple[LanguageModel, ...]:
    precision = PrecisionConfig(params="fp32" if model.params_dtype == "fp32" else "bf16")
    config = core_config(model, parallel, precision, impl="local", cpu=True, stage=stage)
    config.init_model_with_meta_device = True
    groups = open_groups(enumerations, timedelta(seconds=60))
    with without_cuda(), torch.device("meta"):
        return build_chunks(model, parallel, config, groups, impl="local")


@contextlib.contextmanager
def _fake_world(rank: int, size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
