"""The gradients of SwiGLU in one pass over memory: what torch compiles of Megatron's formulae takes twice as long."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@torch.compiler.disable
def swiglu_back(grad: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of silu(a) * b by its input, a and b behind one another, in fp32 arithmetic.

    Shapes: grad (..., D), inputs (..., 2 * D) -> (..., 2 * D)
    """
    grad, inputs = grad.contiguous(), inputs.contiguous()
    out, width = torch.empty_like(inputs), grad.size(-1)
    rows = grad.numel() // width if width else 0
    if rows:
        _swiglu_back[(rows, triton.cdiv(width, BLOCK))](grad, inputs, out, width, BLOCK, num_warps=WARPS)
    return out


@torch.compiler.disable
def weighted_swiglu_back(grad: Tensor, inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of silu(a) * b * w by its input and by w, a number a row.

    Shapes: grad (T, D), inputs (T, 2 * D), weights (T, 1) -> (T, 2 * D), (T, 1)
    """
    grad, inputs, weights = grad.contiguous(), inputs.contiguous(), weights.contiguous()
    out, by_weight, (rows, width) = torch.empty_like(inputs), torch.empty_like(weights), grad.shape
    if rows:
        block = min(BLOCK, triton.next_power_of_2(width))
        _weighted_swiglu_back[(rows,)](grad, inputs, weights, out, by_weight, width, block, num_warps=WARPS)
    return out, by_weight


@triton.jit
def _gradients(g, a, b):
    s = tl.sigmoid(a)
    return g * b * s * (1 + a * (1 - s)), g * a * s


@triton.jit
def _swiglu_back(grad, inputs, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first, second = 2 * row * width + column, (2 * row + 1) * width + column
    g = tl.load(grad + row * width + column, inside).to(tl.float32)
    a = tl.load(inputs + first, inside).to(tl.float32)
    b = tl.load(inputs + second, inside).to(tl.float32)
    by_a, by_b = _gradients(g, a, b)
    tl.store(out + first, by_a.to(out.dtype.element_ty), inside)
    tl.store(out + second, by_b.to(out.dtype.element_ty), inside)


@triton.jit
def _weighted_swiglu_back(grad, inputs, weights, out, by_weight, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        first, second = 2 * row * width + column, (2 * row + 1) * width + column
        g = tl.load(grad + row * width + column, inside, 0.0).to(tl.float32)
        a = tl.load(inputs + first, inside, 0.0).to(tl.float32)
        b = tl.load(inputs + second, inside, 0.0).to(tl.float32)
        by_a, by_b = _gradients(g * w, a, b)
        tl.store(out + first, by_a.to(out.dtype.element_ty), inside)
        tl.store(out + second, by_b.to(out.dtype.element_ty), inside)
        total += g * a * tl.sigmoid(a) * b
    tl.store(by_weight + row, tl.sum(total, 0).to(by_weight.dtype.element_ty))
