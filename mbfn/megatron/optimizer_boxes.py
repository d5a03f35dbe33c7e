"""The distributed optimizer's state as each rank holds it: no gathering to save it, no more read than is kept.

Megatron's own `fully_reshardable` gathers every state on all data-parallel ranks to save it, and has each rank load all
of it. A rank's share of a weight is a stretch of its flattened elements; as boxes of the global tensor, the checkpoint
is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mbfn.megatron.sharded import boxes_in_range

STATE = "optimizer.state"


def box_methods(part: DistributedOptimizer) -> dict[str, Callable]:
    """What takes the place of Megatron's two methods that make and load the state of weights."""
    return {
        "sharded_param_state_fully_reshardable": lambda model_state, is_loading=False, metadata=None: _states(
            part, model_state, is_loading=is_loading
        ),
        "load_parameter_state_from_fully_reshardable": lambda state: _load_states(part, state),
    }


def _states(part: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[int, dict[str, Any]]:
    """By the number of each weight: its flat states, and their boxes."""
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    entries = {id(entry.data): entry for entry in nested_values(tensors)}
    states = {}
    for number, param in enumerate(part.model_param_group_index_map):
        start = part._get_model_param_range_map(param)["param"].start
        flat = {key: value for key, value in part._get_main_param_and_optimizer_states(param).items() if key != "step"}
        entry = entries[id(param)]
        # The copy of tied embeddings on the last stage has other stretches of the same state.
        wanted = is_loading or is_main_replica(entry.replica_id[:-1])
        boxes = {key: list(_boxes(entry, key, value, start)) if wanted else [] for key, value in flat.items()}
        states[number] = {"flat": LocalNonpersistentObject(flat), "boxes": boxes}
    return states


def _boxes(entry: ShardedTensor | ShardedTensorFactory, name: str, flat: Tensor, start: int) -> Iterator[ShardedTensor]:
    return boxes_of(entry, f"{STATE}.{name}.{entry.key}", flat.detach(), start)


def boxes_of(
    entry: ShardedTensor | ShardedTensorFactory, key: str, flat: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """The boxes that `flat`, the elements of a weight from `start` on, is made of; they share its memory."""
    like = torch.empty(entry.data.shape, dtype=flat.dtype, device="meta")
    change: dict[str, Any] = {"key": key, "data": like}
    if isinstance(entry, ShardedTensorFactory):
        pieces = list(nested_values({"all": replace(entry, **change).build()}))
    else:
        pieces = [replace(entry, dtype=flat.dtype, **change)]
    for piece in pieces:
        view: Tensor = piece.data
        if view is not like and view._base is not like:
            raise ValueError(f"{piece.key}: its part of {entry.key} is no view of it")
        first, strides = int(view.storage_offset()), view.stride()
        for offset, shape in boxes_in_range(view.shape, strides, first, start, start + flat.numel()):
            place = first + sum(at * stride for at, stride in zip(offset, strides, strict=True)) - start
            yield _box(piece, offset, flat.as_strided(shape, strides, flat.storage_offset() + place))


def _box(piece: ShardedTensor, offset: tuple[int, ...], data: Tensor) -> ShardedTensor:
    """A part of `piece` that begins at `offset` in it."""
    axes = piece.prepend_axis_num
    inner = (a + b for a, b in zip(piece.global_offset[axes:], offset, strict=True))
    return replace(
        piece,
        data=data,
        local_shape=tuple(data.shape),
        global_offset=(*piece.global_offset[:axes], *inner),
        axis_fragmentations=None,
    )


def _load_states(part: DistributedOptimizer, states: dict[int, dict[str, Any]]) -> None:
    """Set every state from its flat tensor, which loading has filled through the boxes."""
    for number, param in enumerate(part.model_param_group_index_map):
        part._set_main_param_and_optimizer_states(param, states[number]["flat"])
    synchronise = getattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers", None)
    if synchronise is not None:
        synchronise()
