"""Triton's kernels without a GPU: run by its interpreter, and compiled for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def check_interpreted(module: str, name: str) -> None:
    """`python -m MODULE NAME` in a process whose kernels are interpreted: that is decided where they are defined."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    command, root = [sys.executable, "-m", module, name], Path(__file__).parents[2]
    made = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.strip() == f"passed {name}"


def check_close(found: Tensor | None, wanted: Tensor | None, bound: float, *, small: float) -> None:
    """No element is further off than `bound` of its size, or of `small` where that is larger by far."""
    assert found is not None
    assert wanted is not None
    assert found.shape == wanted.shape
    off = (found.float() - wanted.float()).abs() / (wanted.float().abs() + small)
    assert off.numel() == 0 or off.max() < bound, f"off by {off.max()}, expected at most {bound}"


def shifted(values: Tensor, by: int) -> Tensor:
    """The same, starting `by` elements into its storage."""
    return torch.cat([values.flatten()[:by], values.flatten()])[by:].view_as(values)


def compiled(
    kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, Any], *, warps: int, stages: int = 3
) -> Any:
    """What a kernel becomes for Hopper; its tensors, and integers marked as `i32 * 16`, are multiples of 16."""
    kinds = {name: kind.removesuffix(" * 16") for name, kind in arguments.items()}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    even = [at for at, name in enumerate(signature) if "*" in arguments.get(name, "")]
    source = ASTSource(kernel, signature, dict(constants), {(at,): [["tt.divisibility", 16]] for at in even})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
