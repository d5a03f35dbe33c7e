"""AdamW in one pass over memory, as a Triton kernel over many tensors at once.

Every element is read and written once: the gradient is clipped on the way, moments and weights keep their own formats,
and a bf16 weight is joined with the 16 bits that make it an fp32 one. Each program works on one block of one tensor.
Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the decay multiplied by the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbfn.megatron.table_kernel import ALIGNED, FORMATS, pointer_at

Master = Literal["none", "remainder", "fp32"]
type Sort = tuple[tuple[torch.dtype, ...], Master, bool]  # formats, master, whether aligned
BLOCK, WARPS = 1024, 4  # 4.1 TB/s on an H200, where a copy takes 4.3; 2048 elements by 4 warps 3.6
_COLUMNS = 6  # of a row of the table: weight, gradient, moments, master: addresses; elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one update takes beside the tensors."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # of this update, from 1
    clip: float = 1.0  # what gradients are multiplied by


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor and its state, all flat and of one length, on one device."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None = None  # int16 remainder of a bf16 weight, or an fp32 copy

    @property
    def formats(self) -> tuple[torch.dtype, ...]:
        """Of everything but the master weight."""
        return tuple(part.dtype for part in (self.weight, self.grad, self.exp_avg, self.exp_avg_sq))

    @property
    def kind(self) -> Master:
        """How the fp32 weight is kept."""
        if self.master is None:
            return "none"
        return "remainder" if self.master.dtype == torch.int16 else "fp32"

    @property
    def row(self) -> tuple[int, ...]:
        """Its row of the table."""
        parts = (self.weight, self.grad, self.exp_avg, self.exp_avg_sq)
        master = 0 if self.master is None else self.master.data_ptr()
        return (*(part.data_ptr() for part in parts), master, self.weight.numel())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of the same formats as the kernel takes them."""

    rows: tuple[tuple[int, ...], ...]
    table: Tensor  # (N, 6) int64
    blocks: Tensor  # (number of blocks, 2) int32: row, block of the tensor
    formats: tuple[torch.dtype, ...]
    master: Master
    aligned: bool  # every tensor starts at a multiple of 16 bytes and has a multiple of 16 elements


def batched(weights: Sequence[Weight], known: Sequence[Batch] = ()) -> tuple[Batch, ...]:
    """The weights sorted into as few batches as their formats allow; `known` ones that still hold are kept."""
    sorted_by: dict[Sort, list[tuple[int, ...]]] = {}
    devices = {}
    for weight in weights:
        row = weight.row
        if row[-1]:
            aligned = all(number % ALIGNED == 0 for number in row)
            key: Sort = (weight.formats, weight.kind, aligned)
            sorted_by.setdefault(key, []).append(row)
            devices[key] = weight.weight.device
    kept = {(batch.formats, batch.master, batch.aligned, batch.rows): batch for batch in known}
    return tuple(
        kept.get((*key, tuple(rows))) or _batch(key, tuple(rows), devices[key]) for key, rows in sorted_by.items()
    )


def _batch(sort: Sort, rows: tuple[tuple[int, ...], ...], device: torch.device) -> Batch:
    formats, master, aligned = sort
    counts = torch.tensor([-(-row[-1] // BLOCK) for row in rows], device=device)
    tensor = torch.repeat_interleave(torch.arange(len(rows), device=device), counts)
    block = torch.arange(len(tensor), device=device) - (counts.cumsum(0) - counts)[tensor]
    blocks = torch.stack([tensor, block], dim=1).int()
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return Batch(rows=rows, table=table, blocks=blocks, formats=formats, master=master, aligned=aligned)


def adamw(batch: Batch, rates: Rates) -> None:
    """Update the tensors of a batch in place. Errors of every result are those of fp32 arithmetic."""
    _adamw[(len(batch.blocks),)](
        batch.table,
        batch.blocks,
        rates.clip,
        rates.lr,
        rates.beta1,
        rates.beta2,
        rates.eps,
        rates.weight_decay,
        1 - rates.beta1**rates.step,
        1 - rates.beta2**rates.step,
        *(FORMATS[dtype] for dtype in batch.formats),
        batch.master,
        batch.aligned,
        BLOCK,
        _COLUMNS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["clip", "lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2"])
def _adamw(
    table,
    blocks,
    clip,
    lr,
    beta1,
    beta2,
    eps,
    decay,
    correction1,
    correction2,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    number = tl.program_id(0)
    row = table + tl.load(blocks + 2 * number) * COLUMNS
    size = tl.load(row + 5)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    at = tl.load(blocks + 2 * number + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    weights = pointer_at(row, WEIGHT, ALIGNED) + at
    grads = pointer_at(row + 1, GRAD, ALIGNED) + at
    firsts = pointer_at(row + 2, EXP_AVG, ALIGNED) + at
    seconds = pointer_at(row + 3, EXP_AVG_SQ, ALIGNED) + at
    g = tl.load(grads, inside).to(tl.float32) * clip
    m = tl.load(firsts, inside).to(tl.float32)
    v = tl.load(seconds, inside).to(tl.float32)
    if MASTER == "remainder":
        remainders = pointer_at(row + 4, tl.int16, ALIGNED) + at
        high = tl.load(weights, inside).to(tl.int16, bitcast=True).to(tl.int32)
        bits = (high << 16) + tl.load(remainders, inside).to(tl.int32)
        p = bits.to(tl.float32, bitcast=True)
    elif MASTER == "fp32":
        masters = pointer_at(row + 4, tl.float32, ALIGNED) + at
        p = tl.load(masters, inside)
    else:
        p = tl.load(weights, inside).to(tl.float32)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    root = tl.sqrt_rn(tl.div_rn(v, correction2))
    p = p - lr * (tl.div_rn(tl.div_rn(m, correction1), root + eps) + decay * p)
    tl.store(firsts, m.to(EXP_AVG), inside)
    tl.store(seconds, v.to(EXP_AVG_SQ), inside)
    if MASTER == "remainder":
        bits = p.to(tl.int32, bitcast=True)
        low = bits.to(tl.int16)
        tl.store(remainders, low, inside)
        high = ((bits - low.to(tl.int32)) >> 16).to(tl.int16)
        tl.store(weights, high.to(tl.bfloat16, bitcast=True), inside)
    else:
        if MASTER == "fp32":
            tl.store(masters, p, inside)
        tl.store(weights, p.to(WEIGHT), inside)
