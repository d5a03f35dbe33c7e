"""The tensors that adapters start with, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mbfn.config.adapters import Adapter
from mbfn.config.run import RunConfig
from mbfn.convert.adapters import adapter_table, adapter_to_megatron
from mbfn.convert.plans import Layout, rank_plans
from mbfn.convert.states import PlannedState
from mbfn.megatron.settings import choose_impl
from mbfn.megatron.weights import SeededTensors
from mbfn.megatron.world import World


class FreshAdapters(SeededTensors):
    """As PEFT starts them: A uniform as a new linear of torch, B zero.

    DoRA's lengths are ones here; they are those of the weights once these are there.
    """

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if not name.endswith("lora_A.weight"):
            return torch.ones(shape) if len(shape) == 1 else torch.zeros(shape)
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name))


class Joined(Mapping[str, Tensor]):
    """Two mappings of different names as one; each tensor is made when it is asked for."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, name: str) -> Tensor:
        return self._first[name] if name in self._first else self._second[name]

    def __contains__(self, name: object) -> bool:
        return name in self._first or name in self._second

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from self._second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)


def start_weights(
    run: RunConfig, world: World, adapters: tuple[Adapter, ...], source: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """This rank's adapter tensors, by their names in its model.

    Raises: ConversionError for a `source` that does not hold exactly the adapters of the run.
    """
    impl = choose_impl(world.device)
    if source is not None:
        return adapter_to_megatron(source, run.model, adapters, parallel=run.parallel, rank=world.rank, impl=impl)
    table = adapter_table(run.model, adapters, run.parallel)
    fresh = FreshAdapters(table.hf_shapes, run.train.seed)
    return PlannedState(rank_plans(table, Layout(parallel=run.parallel, impl=impl), world.rank), fresh)
