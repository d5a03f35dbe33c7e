"""Packed rows: several samples behind one another, each with positions and attention of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mbfn.errors import DataError
from mbfn.megatron.world import World


@dataclass(kw_only=True)
class Segments(PackedSeqParams):
    """Where the samples of a row lie, as Megatron and Transformer Engine take it, and on the host for torch."""

    lengths: tuple[int, ...] = ()


def segments(cu_seqlens: Tensor, world: World) -> Segments:
    """The samples between neighbouring entries of `cu_seqlens`.

    With context parallelism the kernels of Transformer Engine want the offsets of padded samples too: the same here.
    """
    bounds = cu_seqlens.to(dtype=torch.int32, device=world.device)
    lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    padded = bounds if world.parallel.cp > 1 else None
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        pad_between_seqs=False,
        lengths=lengths,
    )


def zigzag(length: int, size: int, rank: int) -> Tensor:
    """Positions of a sequence that `rank` of `size` context-parallel ranks holds: chunks `rank` and `2*size-1-rank`."""
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def held_positions(lengths: Sequence[int], size: int, rank: int) -> Tensor:
    """Positions of a row of samples that `rank` of `size` context-parallel ranks holds: each sample's zigzag share."""
    starts = accumulate(lengths, initial=0)
    return torch.cat([start + zigzag(length, size, rank) for start, length in zip(starts, lengths, strict=False)])


def own_part(batch: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """The part of a micro-batch that this context-parallel rank works on, on its device; `packed` is its segments.

    Raises: DataError for a packed micro-batch that cannot be cut over the ranks.
    """
    moved: dict[str, Any] = {
        name: value.to(world.device, non_blocking=True) for name, value in batch.items() if name != "cu_seqlens"
    }
    moved["loss_mask"] = moved["loss_mask"].float()
    bounds, length = batch.get("cu_seqlens"), batch["tokens"].size(1)
    if bounds is not None:
        check_segments(bounds, batch["tokens"].shape, cp=world.parallel.cp)
    packed = None if bounds is None else segments(bounds, world)
    if world.parallel.cp > 1:
        lengths = (length,) if packed is None else packed.lengths
        positions = held_positions(lengths, world.parallel.cp, world.coordinates.cp).to(world.device)
        moved = {name: _cut(value, length, positions) for name, value in moved.items()}
    return moved | {"packed": packed}


def check_segments(cu_seqlens: Tensor, shape: Sequence[int], *, cp: int) -> None:
    """Raises: DataError unless `cu_seqlens` covers the one row of `shape` with samples that `cp` ranks can share."""
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if shape[0] != 1:
        raise DataError(f"cu_seqlens: packed micro-batches have one row, found {shape[0]}; set micro_batch_size=1")
    if bounds[0] != 0 or bounds[-1] != shape[1] or min(lengths) < 1:
        raise DataError(f"cu_seqlens: expected to rise from 0 to the row's {shape[1]} tokens, found {bounds}")
    if cp > 1 and (odd := [length for length in lengths if length % (2 * cp)]):
        raise DataError(
            f"cu_seqlens: samples of {odd} tokens cannot be shared by cp={cp} ranks; "
            f"pad each to a multiple of 2 * cp = {2 * cp}"
        )


def _cut(value: Tensor, length: int, positions: Tensor) -> Tensor:
    """What is given for each token, cut; what is given for each row, whole."""
    return value.index_select(1, positions) if value.dim() > 1 and value.size(1) == length else value
