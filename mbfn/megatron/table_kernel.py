"""What kernels over many separate tensors share: the tensors are found by a table of their addresses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ALIGNED = 16  # bytes that one load takes
FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer_at(entry, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """Where the tensor of an entry starts. Said of the number in place of the pointer, the alignment would be lost."""
    at = tl.load(entry).to(tl.pointer_type(FORMAT))
    if EVEN:
        at = tl.multiple_of(at, 16)
    return at
