"""Which boxes of the global Megatron tensors each rank holds, and under which names: the layout of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mbfn.config.parallel import ParallelConfig, RankCoordinates, coordinates, pipeline_layers
from mbfn.convert.copies import Shape
from mbfn.convert.table import GlobalTensor, Impl, Table
from mbfn.families.rule import EXPERT


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
    chunks = pipeline_layers(table.model.num_layers, parallel)[place.pp]
    for chunk, layers in enumerate(chunks):
        prefix = f"model{chunk}." if parallel.vpp > 1 else ""
        first = place.pp == 0 and chunk == 0
        last = place.pp == parallel.pp - 1 and chunk == parallel.vpp - 1
        for tensor in _chunk_tensors(table, parallel, place, layers, first=first, last=last):
            shape, pieces = _cut(tensor, table, parallel, place)
            yield LocalTensor(prefix + _local_name(tensor, table, parallel, layers, impl), tensor, shape, pieces)


def is_main_replica(tensor: GlobalTensor, parallel: ParallelConfig, rank: int) -> bool:
    """Whether `rank` is the first of the ranks that hold the same box, the one that writes it to a checkpoint."""
    place = coordinates(parallel, rank)
    if tensor.rule.stage == "first" and place.pp > 0:
        return False  # the copy that layers for further tokens embed with
    if tensor.rule.is_expert:
        return place.edp == 0 and (place.etp == 0 or tensor.rule.cut is not None)
    return place.dp == 0 and place.cp == 0 and (place.tp == 0 or tensor.rule.cut is not None)


def _chunk_tensors(
    table: Table, parallel: ParallelConfig, place: RankCoordinates, layers: range, *, first: bool, last: bool
) -> Iterator[GlobalTensor]:
    """The global tensors of one model chunk: its layers, its share of their experts, what the ends hold besides."""
    at = table.places
    share = table.sizes[EXPERT] // parallel.ep
    experts = (None, *range(place.ep * share, (place.ep + 1) * share))
    if first:
        yield from at.get(("first", None, None), ())
    for layer in layers:
        for expert in experts:
            yield from at.get(("layer", layer, expert), ())
    if last:
        yield from (tensor for tensor in at.get(("last", None, None), ()) if not (tensor.rule.tied and first))
        if table.model.mtp_num_layers and not first:
            yield from at.get(("first", None, None), ())
        for layer in range(table.model.mtp_num_layers):
            for expert in experts:
                yield from at.get(("mtp", layer, expert), ())


def _local_name(tensor: GlobalTensor, table: Table, parallel: ParallelConfig, layers: range, impl: Impl) -> str:
    """The name in the chunk's own model, which numbers its layers and experts from 0."""
    rule = tensor.rule
    template = rule.te if impl == "te" and rule.te else rule.mc
    layer = tensor.layer if rule.stage == "mtp" or tensor.layer is None else tensor.layer - layers.start
    expert = tensor.expert
    return template.format(i=layer, e=None if expert is None else expert % (table.sizes[EXPERT] // parallel.ep))


def _cut(
    tensor: GlobalTensor, table: Table, parallel: ParallelConfig, place: RankCoordinates
) -> tuple[Shape, tuple[Piece, ...]]:
    """Local shape and boxes: each section of the cut dimension is divided over tp, the shares laid end to end."""
    dim, whole = tensor.rule.cut, tensor.shape
    if dim is None:
        return whole, (Piece((0,) * len(whole), whole, (0,) * len(whole)),)
    size, mine = (parallel.etp, place.etp) if tensor.rule.is_expert else (parallel.tp, place.tp)
    pieces, begin, filled = [], 0, 0
    for section in tensor.rule.sections(table.sizes):
        share = section // size
        low = begin + mine * share
        start = tuple(low if d == dim else 0 for d in range(len(whole)))
        stop = tuple(low + share if d == dim else n for d, n in enumerate(whole))
        at = tuple(filled if d == dim else 0 for d in range(len(whole)))
        pieces.append(Piece(start, stop, at))
        begin, filled = begin + section, filled + share
    return tuple(filled if d == dim else n for d, n in enumerate(whole)), tuple(pieces)
