"""The states of all ranks as one lazy mapping on rank 0: a tensor crosses over when it is asked for, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbfn.megatron import World

States = Mapping[int, Mapping[str, Tensor]]


def with_all_states[T](world: World, own: Mapping[str, Tensor], use: Callable[[States], T]) -> T | None:
    """What `use` makes on rank 0 of the states of every rank; none on the others, which serve it. Collective.

    Rank 0 holds the tensors that `use` keeps, on CPU, and no others.
    """
    if world.world_size == 1:
        return use({0: own})
    metas: list[Any] = [None] * world.world_size
    dist.all_gather_object(metas, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()})
    if world.rank:
        _serve(world, own)
        return None
    try:
        return use({rank: _RemoteState(world, own, rank, names) for rank, names in enumerate(metas)})
    finally:
        _broadcast(world, None)


@dataclass(frozen=True, slots=True, eq=False)
class _RemoteState(Mapping[str, Tensor]):
    """The state of `rank`, seen from rank 0."""

    world: World
    own: Mapping[str, Tensor]
    rank: int
    metas: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.metas[name]
        if self.rank == 0:
            return self.own[name].detach().cpu()
        _broadcast(self.world, (self.rank, name))
        received = torch.empty(shape, dtype=dtype, device=self.world.device)
        dist.recv(received, src=self.rank)
        return received.cpu()

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype without data, so that nothing crosses over for it."""
        shape, dtype = self.metas[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)


def _serve(world: World, own: Mapping[str, Tensor]) -> None:
    while (request := _broadcast(world, None)) is not None:
        rank, name = request
        if rank == world.rank:
            dist.send(own[name].detach().to(world.device).contiguous(), dst=0)


def _broadcast(world: World, request: tuple[int, str] | None) -> tuple[int, str] | None:
    """Rank 0's `request`, on every rank."""
    box: list[Any] = [request]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]
