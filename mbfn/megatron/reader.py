"""A checkpoint into tensors that are there already: each rank reads its share and gets the rest from other ranks."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor

from mbfn.convert.copies import Copy, contiguous_strides
from mbfn.errors import CheckpointError
from mbfn.megatron.sharded import Box, Ident, box_of, divide, gather_holdings
from mbfn.storage.streams import run_all
from mbfn.storage.torch_dist import TorchDistCheckpoint, open_torch_dist

_THREADS = 2
_EXTRA = "_extra_state/"


class ParallelReader:
    """What `dist_checkpointing.load` asks to read the tensors and objects of a state.

    Ranks of `group` that want the same box share it: one reads, the others receive it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def load(self, state: dict[str, Any], directory: Path, _: str = "") -> dict[str, Any]:
        """`state` with every entry replaced by its value; tensors are read into the memory they have. Collective.

        Raises: CheckpointError that names what is missing or has another shape.
        """
        with open_torch_dist(directory) as source:
            entries = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
            boxes = [box_of(entry) for entry in entries]
            for entry, box in zip(entries, boxes, strict=True):
                _check(source, box, any_size=entry.allow_shape_mismatch)
            self._fill(source, boxes)
            dict_list_map_inplace(partial(_value, source), state)
        return state

    def _fill(self, source: TorchDistCheckpoint, boxes: Sequence[Box]) -> None:
        """Read each box once; a box that every rank of the group wants, on one of them."""
        first = {box.ident: box for box in reversed(boxes)}
        holdings = gather_holdings({ident: box.nbytes for ident, box in first.items()}, self._group)
        common = frozenset.intersection(*map(frozenset, holdings)) if len(holdings) > 1 else frozenset[Ident]()
        shares = divide([{ident: own[ident] for ident in common} for own in holdings])
        mine = shares[dist.get_rank(self._group)] | (first.keys() - common)
        run_all((partial(_read, source, first[ident]) for ident in sorted(mine)), _THREADS)
        for reader, share in enumerate(shares):
            for ident in sorted(share):
                self._pass_on(first[ident].data, reader)
        for box in boxes:
            if box is not first[box.ident]:
                box.data.copy_(first[box.ident].data)

    def _pass_on(self, data: Tensor, reader: int) -> None:
        sent = data if data.is_contiguous() else data.contiguous()
        dist.broadcast(sent, group=self._group, group_src=reader)
        if sent is not data:
            data.copy_(sent)


def _check(source: TorchDistCheckpoint, box: Box, *, any_size: bool) -> None:
    if box.key not in source:
        raise CheckpointError(f"{source.path}: {box.key}: missing; the checkpoint is of another model or optimizer")
    found = tuple(source.meta(box.key).shape)
    if found != box.global_shape and not (any_size and found[1:] == box.global_shape[1:]):
        raise CheckpointError(
            f"{source.path}: {box.key}: expected shape {list(box.global_shape)}, found {list(found)}; it is "
            "a checkpoint of another model"
        )


def _read(source: TorchDistCheckpoint, box: Box) -> None:
    """Read one box; rows beyond the stored tensor, padding of the vocabulary, become zero."""
    meta = source.meta(box.key)
    stop = [min(at + size, end) for at, size, end in zip(box.offset, box.shape, meta.shape, strict=True)]
    shape = tuple(max(0, end - at) for at, end in zip(box.offset, stop, strict=True))
    direct = box.data.device.type == "cpu" and box.data.is_contiguous() and box.data.dtype == meta.dtype
    out = box.data if direct else torch.empty(box.shape, dtype=meta.dtype)
    if shape != box.shape:
        out.zero_()
    strides = contiguous_strides(tuple(meta.shape))
    place = sum(at * stride for at, stride in zip(box.offset, strides, strict=True))
    source.read_into(Copy(box.key, shape, place, strides, 0, contiguous_strides(box.shape)), out.view(-1))
    if not direct:
        box.data.copy_(out.view(box.data.shape))


def _value(source: TorchDistCheckpoint, entry: Any) -> Any:
    if isinstance(entry, ShardedTensor):
        return entry.data
    if isinstance(entry, ShardedObject):
        return _object(source, entry.unique_key)
    return entry


def _object(source: TorchDistCheckpoint, key: str) -> Any:
    """An object. A checkpoint is trusted as a whole, so pickles of any class are read."""
    if key not in source.objects:
        if _EXTRA in key:
            return None  # of another precision, or of local modules: they have none
        raise CheckpointError(f"{source.path}: {key}: missing; the checkpoint is of another model or optimizer")
    chunk = source.objects[key]
    with chunk.file.open("rb") as file:
        blob = os.pread(file.fileno(), chunk.length, chunk.position)
    found = torch.load(io.BytesIO(blob), weights_only=False, map_location="cpu")
    return found[0] if isinstance(found, list) and len(found) == 1 else found
