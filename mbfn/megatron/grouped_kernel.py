"""Products of every expert's tokens with its own weights, in one Triton kernel each, of counts that lie on the device.

Rows are sorted by expert. How many an expert has only the device knows: the host launches as many blocks as there could
be, and a map made on the device says of each which expert and rows it is, or none. Weights and gradient buffers are
separate tensors, found by a table of their addresses. All sums are in fp32, in one order: results do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbfn.megatron.table_kernel import ALIGNED, FORMATS, pointer_at

ROWS = 128  # of a block of output; the map of blocks is one for all products
_MAPPED = 32  # blocks that one program of the map finds
_FIELDS = 3  # of a block: expert or -1, first row, end of the expert's rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one kernel cuts its work."""

    rows: int  # of a block of output
    cols: int
    inner: int  # of the sum that one step adds
    warps: int
    stages: int  # blocks of input in flight
    group: int = 8  # blocks down before the next column: they share what the cache holds
    loop: int = 0  # programs a multiprocessor that take block after block; 0: one program a block


PRODUCT = Tile(rows=ROWS, cols=256, inner=64, warps=8, stages=4)  # of seven on an H200 the fastest, each way
GRADIENT = Tile(rows=128, cols=128, inner=64, warps=4, stages=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Which rows are whose, on the device."""

    offsets: Tensor  # (E + 2,) int32: rows of expert e are offsets[e] .. offsets[e + 1]; last, the number of blocks
    blocks: Tensor  # (M, 3) int32, of which that many are set
    block_rows: int

    @property
    def experts(self) -> int:
        """E."""
        return len(self.offsets) - 2


def grouped(counts: Tensor, rows: int, *, block_rows: int = ROWS) -> Groups:
    """The map of `rows` rows, of which the experts have `counts`. Shapes: counts (E,)."""
    experts = len(counts)
    most = rows // block_rows + min(experts, rows)  # each expert's last block may be part full
    offsets = torch.empty(experts + 2, dtype=torch.int32, device=counts.device)
    blocks = torch.empty(most, _FIELDS, dtype=torch.int32, device=counts.device)
    grid = (max(1, triton.cdiv(most, _MAPPED)),)
    padded = triton.next_power_of_2(experts)
    _map[grid](counts, offsets, blocks, most, experts, padded, block_rows, _MAPPED, _FIELDS)
    return Groups(offsets=offsets, blocks=blocks, block_rows=block_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Addresses of one matrix an expert, all of one shape and format."""

    found: tuple[int, ...]
    addresses: Tensor  # (E,) int64
    dtype: torch.dtype
    aligned: bool  # every one starts at a multiple of 16 bytes


def table_of(matrices: Sequence[Tensor], known: Table | None = None) -> Table:
    """The matrices' table: `known` if they are still there."""
    found = tuple([matrix.data_ptr() for matrix in matrices])
    dtype = matrices[0].dtype
    if known is not None and known.found == found and known.dtype == dtype:
        return known
    addresses = torch.tensor(found, dtype=torch.int64, device=matrices[0].device)
    aligned = all(address % ALIGNED == 0 for address in found)
    return Table(found=found, addresses=addresses, dtype=dtype, aligned=aligned)


def product(x: Tensor, weights: Table, groups: Groups, cols: int, *, transposed: bool, tile: Tile = PRODUCT) -> Tensor:
    """Each row times its expert's matrix, which is (N, K) or, `transposed`, (K, N). Shapes: (T, K) -> (T, N = cols).

    Forward is x @ W^T of a weight (N, K); its gradient for x, dy @ W, reads the same weight `transposed`.
    """
    out = x.new_empty(x.size(0), cols)
    if len(groups.blocks) == 0:
        return out
    _product[_grid(len(groups.blocks) * triton.cdiv(cols, tile.cols), tile, x)](
        x,
        out,
        weights.addresses,
        groups.offsets,
        groups.blocks,
        groups.experts,
        cols,
        x.size(1),
        not transposed,
        weights.aligned,
        FORMATS[weights.dtype],
        groups.block_rows,
        tile.cols,
        tile.inner,
        tile.group,
        _FIELDS,
        tile.loop > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def add_gradient(dy: Tensor, x: Tensor, grads: Table, groups: Groups, *, tile: Tile = GRADIENT) -> None:
    """Add each expert's dy^T @ x to its buffer. Shapes: dy (T, N), x (T, K), buffers (N, K)."""
    rows, cols = dy.size(1), x.size(1)
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    _add_gradient[_grid(groups.experts * blocks, tile, x)](
        dy,
        x,
        grads.addresses,
        groups.offsets,
        groups.experts,
        rows,
        cols,
        grads.aligned,
        FORMATS[grads.dtype],
        tile.rows,
        tile.cols,
        tile.inner,
        tile.group,
        tile.loop > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _grid(blocks: int, tile: Tile, where: Tensor) -> tuple[int]:
    """Programs of a kernel over that many blocks."""
    if not tile.loop:
        return (blocks,)
    cores = torch.cuda.get_device_properties(where.device).multi_processor_count if where.is_cuda else 3
    return (min(blocks, tile.loop * cores),)


@triton.jit(do_not_specialize=["most"])
def _map(
    counts,
    offsets,
    blocks,
    most,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    MAPPED: tl.constexpr,
    FIELDS: tl.constexpr,
):
    expert = tl.arange(0, PADDED)
    count = tl.load(counts + expert, expert < EXPERTS, 0).to(tl.int32)
    end = tl.cumsum(count, 0)
    held = (count + ROWS - 1) // ROWS
    last = tl.cumsum(held, 0)  # blocks up to and with the expert's
    shift = end - count - (last - held) * ROWS  # of its first row, from where it would be if all blocks were full
    if tl.program_id(0) == 0:
        tl.store(offsets + expert, end - count, expert < EXPERTS)
        tl.store(offsets + EXPERTS, tl.sum(count, 0))
        tl.store(offsets + EXPERTS + 1, tl.sum(held, 0))
    block = tl.program_id(0) * MAPPED + tl.arange(0, MAPPED)
    found = tl.sum((last[None, :] <= block[:, None]).to(tl.int32), 1)  # experts that end before the block
    own = expert[None, :] == found[:, None]
    at = blocks + block * FIELDS
    tl.store(at, found, block < most)
    tl.store(at + 1, tl.sum(tl.where(own, shift[None, :], 0), 1) + block * ROWS, block < most)
    tl.store(at + 2, tl.sum(tl.where(own, end[None, :], 0), 1), block < most)


@triton.jit
def _place(number, down, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a block: `GROUP` down, then the next column."""
    first = number // (GROUP * ACROSS) * GROUP
    size = tl.minimum(down - first, GROUP)
    within = number % (GROUP * ACROSS)
    return first + within % size, within // size


@triton.jit
def _product(
    x,
    out,
    weights,
    offsets,
    blocks,
    EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    INNER_LAST: tl.constexpr,  # a weight is (COLS, INNER)
    ALIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
    LOOP: tl.constexpr,
):
    wide: tl.constexpr = (COLS + BLOCK_COLS - 1) // BLOCK_COLS
    even_inner: tl.constexpr = INNER % BLOCK_INNER == 0
    even_cols: tl.constexpr = COLS % BLOCK_COLS == 0
    used = tl.load(offsets + EXPERTS + 1)
    inner = tl.arange(0, BLOCK_INNER)
    first, step = tl.program_id(0), tl.num_programs(0)
    stop = used * wide if LOOP else tl.minimum(used * wide, first + 1)
    for number in tl.range(first, stop, step, flatten=LOOP):
        down, across = _place(number, used, wide, GROUP)
        expert = tl.load(blocks + down * FIELDS)
        row = tl.load(blocks + down * FIELDS + 1) + tl.arange(0, BLOCK_ROWS)
        end = tl.load(blocks + down * FIELDS + 2)
        col = across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        left = x + tl.minimum(row, end - 1).to(tl.int64)[:, None] * INNER + inner[None, :]
        right = pointer_at(weights + expert, WEIGHT, ALIGNED)
        if INNER_LAST:
            right += col[None, :] * INNER + inner[:, None]
        else:
            right += inner[:, None] * COLS + col[None, :]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, INNER, BLOCK_INNER):
            a = tl.load(left) if even_inner else tl.load(left, (start + inner < INNER)[None, :], 0.0)
            if even_inner and even_cols:
                b = tl.load(right)
            else:
                b = tl.load(right, (start + inner < INNER)[:, None] & (col < COLS)[None, :], 0.0)
            total = tl.dot(a, b, total)
            left += BLOCK_INNER
            right += BLOCK_INNER if INNER_LAST else BLOCK_INNER * COLS
        to = out + row.to(tl.int64)[:, None] * COLS + col[None, :]
        held = (row < end)[:, None] if even_cols else (row < end)[:, None] & (col < COLS)[None, :]
        tl.store(to, total.to(out.dtype.element_ty), held)


@triton.jit
def _add_gradient(
    dy,
    x,
    grads,
    offsets,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
    LOOP: tl.constexpr,
):
    high: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    wide: tl.constexpr = (COLS + BLOCK_COLS - 1) // BLOCK_COLS
    even: tl.constexpr = ROWS % BLOCK_ROWS == 0 and COLS % BLOCK_COLS == 0
    inner = tl.arange(0, BLOCK_INNER)
    first, step = tl.program_id(0), tl.num_programs(0)
    stop = EXPERTS * high * wide if LOOP else first + 1
    for number in tl.range(first, stop, step, flatten=LOOP):
        expert = number // (high * wide)
        begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        down, across = _place(number % (high * wide), high, wide, GROUP)
        row, col = down * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        left = dy + begin.to(tl.int64) * ROWS + row[:, None] + inner[None, :] * ROWS
        right = x + begin.to(tl.int64) * COLS + inner[:, None] * COLS + col[None, :]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(begin, end, BLOCK_INNER):
            inside = start + inner < end  # what is beyond may be no number, which times 0 would be none
            if even:
                a = tl.load(left, inside[None, :], 0.0)
                b = tl.load(right, inside[:, None], 0.0)
            else:
                a = tl.load(left, inside[None, :] & (row < ROWS)[:, None], 0.0)
                b = tl.load(right, inside[:, None] & (col < COLS)[None, :], 0.0)
            total = tl.dot(a, b, total)
            left += BLOCK_INNER * ROWS
            right += BLOCK_INNER * COLS
        to = pointer_at(grads + expert, GRAD, ALIGNED) + row[:, None] * COLS + col[None, :]
        held = (row < ROWS)[:, None] & (col < COLS)[None, :] & (begin < end)
        tl.store(to, (tl.load(to, held, 0.0).to(tl.float32) + total).to(GRAD), held)
