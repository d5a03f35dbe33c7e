"""Which boxes of the global Megatron tensors each rank holds, and under which names: the layout of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig, RankCoordinates, coordinates, pipeline_layers
from mbfn.convert.copies import Shape
from mbfn.convert.table import GlobalTensor, Impl, Table


@dataclass(frozen=True, slots=True)
class Piece:
    """The box `[start, stop)` of a global tensor, put at `at` in a rank's local one."""

    start: Shape
    stop: Shape
    at: Shape

    @property
    def shape(self) -> Shape:
        """Lengths of the box."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One entry of a rank's `GPTModel.state_dict()`."""

    name: str
    tensor: GlobalTensor
    shape: Shape
    pieces: tuple[Piece, ...]


def rank_tensors(table: Table, parallel: ParallelConfig, rank: int, impl: Impl) -> Iterator[LocalTensor]:
    """Every tensor that global `rank` holds, in the naming of its own model; with vpp > 1 the chunk leads the name."""
    place = coordinates(parallel, rank)
    stages = pipeline_layers(table.model.num_layers, parallel)[place.pp]
    for chunk, layers in enumerate(stages):
        prefix = f"model{chunk}." if parallel.vpp > 1 else ""
        first = place.pp == 0 and chunk == 0
        last = place.pp == parallel.pp - 1 and chunk == parallel.vpp - 1
        for tensor in table.tensors.values():
            local = _local_layer(tensor, layers, first=first, last=last)
            if local is not None:
                shape, pieces = _cut(tensor, table, parallel, place)
                name = prefix + _local_name(tensor, local, impl)
                yield LocalTensor(name, tensor, shape, pieces)


def is_main_replica(tensor: GlobalTensor, parallel: ParallelConfig, rank: int) -> bool:
    """Whether `rank` is the first of the ranks that hold the same box, the one that writes it to a checkpoint."""
    place = coordinates(parallel, rank)
    return place.dp == 0 and place.cp == 0 and (place.tp == 0 or tensor.rule.cut is not None)


def holders(model: ModelConfig, parallel: ParallelConfig) -> range:
    """Ranks of the layout; every box of the weights is held by at least one of them."""
    del model
    return range(parallel.world_size)


def _local_layer(tensor: GlobalTensor, layers: range, *, first: bool, last: bool) -> int | None:
    """The tensor's layer number on this chunk (0 where it has none), or None when the chunk does not hold it."""
    match tensor.rule.stage:
        case "first":
            return 0 if first else None
        case "last":
            holds = last and not (tensor.rule.tied and first)
            return 0 if holds else None
    assert tensor.layer is not None
    return tensor.layer - layers.start if tensor.layer in layers else None


def _local_name(tensor: GlobalTensor, local_layer: int, impl: Impl) -> str:
    rule = tensor.rule
    template = rule.te if impl == "te" and rule.te else rule.mc
    return template.format(i=local_layer)


def _cut(
    tensor: GlobalTensor, table: Table, parallel: ParallelConfig, place: RankCoordinates
) -> tuple[Shape, tuple[Piece, ...]]:
    """Local shape and boxes: each section of the cut dimension is divided over tp, the shares laid end to end."""
    dim = tensor.rule.cut
    whole = tensor.shape
    if dim is None:
        return whole, (Piece((0,) * len(whole), whole, (0,) * len(whole)),)
    pieces, begin, filled = [], 0, 0
    for section in tensor.rule.sections(table.sizes):
        share = section // parallel.tp
        low = begin + place.tp * share
        start = tuple(low if d == dim else 0 for d in range(len(whole)))
        stop = tuple(low + share if d == dim else size for d, size in enumerate(whole))
        at = tuple(filled if d == dim else 0 for d in range(len(whole)))
        pieces.append(Piece(start, stop, at))
        begin, filled = begin + section, filled + share
    return tuple(filled if d == dim else size for d, size in enumerate(whole)), tuple(pieces)
