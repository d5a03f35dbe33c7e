"""What mixers with a state compute along the text: kernels in 16 bits on a GPU, exact torch elsewhere.

A packed row goes through a kernel once, with the bounds of its samples; torch takes the samples one by one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from torch import Tensor

from mbfn.megatron.packed import Segments

_KERNELS = "flash-linear-attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scans:
    """Three functions over tokens; every sample of `rows` begins with an empty state.

    B rows of S tokens; N heads, or G groups of heads that share; P values and D keys a head; C channels.

    convolution  x (B, S, C), weight (C, 1, K), bias (C) or None, rows -> (B, S, C): each channel's last tokens, SiLU
    decayed      x (B, S, N, P), step (B, S, N), rate (N), write and read (B, S, G, D), chunk, rows -> (B, S, N, P):
                 h_t = exp(step_t rate) h_(t-1) + write_t step_t x_t, y_t = read_t h_t
    delta        query and key (B, S, G, D) of any length, value (B, S, N, P), decay and beta (B, S, N), rows
                 -> (B, S, N, P): the gated delta rule, its queries and keys of length 1
    """

    name: str
    convolution: Callable[[Tensor, Tensor, Tensor | None, Segments | None], Tensor]
    decayed: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Segments | None], Tensor]
    delta: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Segments | None], Tensor]


@functools.cache
def choose_scans(device: torch.device, dtype: torch.dtype, head_sizes: tuple[int, ...]) -> tuple[Scans, str]:
    """What fits tensors of this device and dtype in heads of these sizes, and why."""
    lacking = _lacking(device, dtype, head_sizes)
    if lacking:
        return torch_scans(), lacking
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    found = kernel_scans(causal_conv1d, chunk_simple_gla, chunk_gated_delta_rule)
    return found, f"Triton kernels of {_KERNELS} {importlib.metadata.version('fla-core')}"


def _lacking(device: torch.device, dtype: torch.dtype, head_sizes: tuple[int, ...]) -> str:
    """Why kernels cannot be used; empty where they can."""
    if device.type != "cuda":
        return f"no GPU for kernels of {_KERNELS}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "the kernels round fp32 products to TF32"
    if any(size % 2 or size > 256 for size in head_sizes):
        return f"the kernels take even head sizes up to 256, found {', '.join(map(str, head_sizes))}"
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return f"{_KERNELS} is not installed"
    if _numbers(version) < (0, 6):
        return f"{_KERNELS} {version} is here, 0.6 or newer is needed"
    import triton

    return miscompiled(torch.cuda.get_device_capability(device), triton.__version__)


def miscompiled(capability: tuple[int, int], triton: str) -> str:
    """How this version of Triton spoils the kernels on this GPU. Source: fla-org/flash-linear-attention#640."""
    if capability[0] == 9 and (3, 4) <= _numbers(triton) < (3, 7, 1):
        return f"gradients of the kernels are wrong on Hopper with Triton {triton}, right from 3.7.1 on"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def kernel_scans(conv1d: Callable[..., Any], simple_gla: Callable[..., Any], delta_rule: Callable[..., Any]) -> Scans:
    """Kernels that are called as those of flash-linear-attention. Mamba-2 is its gated attention, written otherwise."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Segments | None) -> Tensor:
        return conv1d(x, weight.squeeze(1), bias, activation="silu", cu_seqlens=_bounds(rows))[0]

    def decayed(
        x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, chunk: int, rows: Segments | None
    ) -> Tensor:
        del chunk
        write, read = _for_heads(write, x), _for_heads(read, x)
        value = (x * step[..., None]).type_as(x)
        return simple_gla(read, write, value, g=step * rate, scale=1.0, cu_seqlens=_bounds(rows))[0]

    def delta(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, rows: Segments | None) -> Tensor:
        given = {"g": decay, "beta": beta, "use_qk_l2norm_in_kernel": True, "cu_seqlens": _bounds(rows)}
        return delta_rule(query, key, value, **given)[0]

    return Scans(name=_KERNELS, convolution=convolution, decayed=decayed, delta=delta)


def torch_scans() -> Scans:
    """The same in torch, on fp32 but for the convolution."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Segments | None) -> Tensor:
        return _each(lambda one: causal_convolution(one, weight, bias), rows, x)

    def decayed(
        x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, chunk: int, rows: Segments | None
    ) -> Tensor:
        x, write, read = x.float(), _for_heads(write.float(), x), _for_heads(read.float(), x)
        return _each(functools.partial(_scanned, chunk=chunk), rows, x * step[..., None], step * rate, write, read)

    def delta(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, rows: Segments | None) -> Tensor:
        query, key = (_for_heads(_unit(x), value) for x in (query, key))
        return _each(_corrected, rows, query, key, value.contiguous(), decay, beta)

    return Scans(name="torch", convolution=convolution, decayed=decayed, delta=delta)


def _bounds(rows: Segments | None) -> Tensor | None:
    return None if rows is None else rows.cu_seqlens_q


def _each(scan: Callable[..., Tensor], rows: Segments | None, *tensors: Tensor) -> Tensor:
    """`scan` of every sample by itself. Shapes: (B, S, ...) -> (B, S, ...)"""
    if rows is None:
        return scan(*tensors)
    samples = zip(*(x.split(rows.lengths, dim=1) for x in tensors), strict=True)
    return torch.cat([scan(*sample) for sample in samples], dim=1)


def _for_heads(shared: Tensor, heads: Tensor) -> Tensor:
    """What a group shares, for each of its heads. Shapes: (B, S, G, D), (B, S, N, P) -> (B, S, N, D)"""
    return shared.repeat_interleave(heads.size(2) // shared.size(2), dim=2)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _corrected(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return torch_chunk_gated_delta_rule(query, key, value, g=decay, beta=beta)[0]


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each channel over its last tokens, then SiLU. Shapes: x (B, S, C), weight (C, 1, K) -> (B, S, C)."""
    padded = F.pad(x.transpose(1, 2), (weight.size(-1) - 1, 0))
    return F.silu(F.conv1d(padded, weight, bias, groups=weight.size(0))).transpose(1, 2)


def _scanned(x: Tensor, decay: Tensor, write: Tensor, read: Tensor, *, chunk: int) -> Tensor:
    """What the state gives after each token: h_t = exp(decay_t) h_(t-1) + write_t x_t, y_t = read_t h_t.

    Chunks are products of matrices; only the states between them follow one another.
    Shapes: x (B, S, N, P), decay (B, S, N), write and read (B, S, N, D) -> (B, S, N, P)
    """
    length, chunk = x.size(1), min(chunk, x.size(1))
    x, decay, write, read = (_chunks(y, chunk) for y in (x, decay, write, read))  # (B, N, chunks, chunk, ...)
    total = decay.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    within = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    out = (read @ write.transpose(-1, -2) * within) @ x
    left = (write * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2) @ x  # what each chunk adds
    state, before = torch.zeros_like(left[:, :, 0]), []
    for number in range(left.size(2)):
        before.append(state)
        state = state * total[:, :, number, -1, None, None].exp() + left[:, :, number]
    out = out + (read * total.exp()[..., None]) @ torch.stack(before, dim=2)
    return out.flatten(2, 3).transpose(1, 2)[:, :length]


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """Shapes: (B, S, N, ...) -> (B, N, ceil(S / chunk), chunk, ...), what is missing zero."""
    missing = -x.size(1) % chunk
    padded = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing))
    return padded.transpose(1, 2).unflatten(2, (-1, chunk))
