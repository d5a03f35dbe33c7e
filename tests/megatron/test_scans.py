"""Scans of layers with a state against the recurrence that they stand for, token by token, in the kernels' terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.megatron.packed import Segments, segments
from mbfn.megatron.resolved import choices
from mbfn.megatron.scans import Scans, choose_scans, kernel_scans, miscompiled, torch_scans
from mbfn.megatron.world import World
from tests.hybrids import prepared
from tests.megatron.tiny import config_of, run_config
from tests.ranks import run_ranks


def recurrent_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str, cu_seqlens: Tensor | None
) -> tuple[Tensor, None]:
    """Shapes: x (B, T, C), weight (C, W), bias (C) -> (B, T, C)."""
    assert activation == "silu"
    out, width = [], weight.size(1)
    for start, stop in _bounds(x, cu_seqlens):
        for t in range(start, stop):
            seen = x[:, max(start, t + 1 - width) : t + 1]  # (B, <= W, C)
            total = (seen * weight.T[width - seen.size(1) :]).sum(1)
            out.append(F.silu(total if bias is None else total + bias))
    return torch.stack(out, dim=1), None


def recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, None]:
    """Shapes: q and k (B, T, H, K), v (B, T, H, V), g (B, T, H) -> (B, T, H, V)."""
    assert q.size(2) == v.size(2)
    out = []
    for start, stop in _bounds(q, cu_seqlens):
        state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        for t in range(start, stop):
            state = state * g[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
            out.append((q[:, t, :, None] * scale @ state).squeeze(-2))
    return torch.stack(out, dim=1), None


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, None]:
    """Shapes: q and k (B, T, H, K), v (B, T, HV, V), g and beta (B, T, HV) -> (B, T, HV, V)."""
    assert use_qk_l2norm_in_kernel
    share = v.size(2) // q.size(2)
    q, k = (F.normalize(x, dim=-1).repeat_interleave(share, dim=2) for x in (q, k))
    out = []
    for start, stop in _bounds(q, cu_seqlens):
        state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        for t in range(start, stop):
            state = state * g[:, t, :, None, None].exp()
            known = (k[:, t, :, None] @ state).squeeze(-2)
            state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - known))[:, :, None]
            out.append((q[:, t, :, None] * q.size(-1) ** -0.5 @ state).squeeze(-2))
    return torch.stack(out, dim=1), None


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    bounds = [0, x.size(1)] if cu_seqlens is None else cu_seqlens.tolist()
    return list(pairwise(bounds))


TOKEN_BY_TOKEN = kernel_scans(recurrent_conv1d, recurrent_gla, recurrent_delta_rule)
CHUNK = 5  # samples are shorter, longer and several times as long


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=3), packed=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["convolution", "decayed", "delta"])
def test_torch_is_the_recurrence(kind: str, lengths: list[int], packed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    rows = _rows(lengths) if packed else None
    tensors = _tensors(kind, 1 if packed else 2, sum(lengths))
    found, wanted = (_with_gradients(_scan(scans, kind, rows), tensors) for scans in (torch_scans(), TOKEN_BY_TOKEN))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def _rows(lengths: Sequence[int]) -> Segments:
    groups = ProcessGroupCollection()
    world = World(rank=0, device=torch.device("cpu"), parallel=ParallelConfig(), groups=groups)
    return segments(torch.tensor([0, *lengths]).cumsum(0), world)


def _tensors(kind: str, rows: int, tokens: int) -> list[Tensor]:
    """Sizes that differ from each other: 6 heads in 2 groups, 7 values and 10 keys a head, 9 channels, 4 taps."""
    each = partial(torch.randn, rows, tokens)
    if kind == "convolution":
        return [each(9), torch.randn(9, 1, 4), torch.randn(9)]
    if kind == "decayed":
        return [each(6, 7), each(6).exp(), -torch.rand(6), each(2, 10), each(2, 10)]
    return [each(2, 10), each(2, 10), each(6, 7), -each(6).exp(), each(6).sigmoid()]


def _scan(scans: Scans, kind: str, rows: Segments | None) -> Callable[..., Tensor]:
    scan = getattr(scans, kind)
    return lambda *tensors: scan(*tensors, *([CHUNK] if kind == "decayed" else []), rows)


def _with_gradients(scan: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    given = [x.clone().requires_grad_() for x in tensors]
    out = scan(*given)
    weights = torch.arange(out.numel()).reshape(out.shape).cos()  # every element counts differently
    return out.detach(), *torch.autograd.grad((out * weights).sum(), given)


def test_kernels_are_taken_where_they_are_right() -> None:
    gpu, sizes = torch.device("cuda"), (64, 128)
    for device, dtype, heads, told in (
        (torch.device("cpu"), torch.bfloat16, sizes, "no GPU"),
        (gpu, torch.float32, sizes, "TF32"),
        (gpu, torch.bfloat16, (64, 7), "even head sizes up to 256, found 64, 7"),
        (gpu, torch.bfloat16, (320, 64), "even head sizes up to 256, found 320, 64"),
    ):
        scans, why = choose_scans(device, dtype, heads)
        assert scans.name == "torch"
        assert told in why
    assert "wrong on Hopper with Triton 3.6.0" in miscompiled((9, 0), "3.6.0")
    assert miscompiled((9, 0), "3.4.0")
    for capability, triton in (((9, 0), "3.3.1"), ((9, 0), "3.7.1"), ((9, 0), "3.10.0"), ((10, 0), "3.6.0")):
        assert not miscompiled(capability, triton)


def test_a_run_names_its_scans() -> None:
    models = {name: config_of(prepared(name)) for name in ("qwen3_5", "nemotron_h", "llama_nemotron")}
    (told,) = run_ranks(1, _told, models)
    line = "layers with a state: torch (no GPU for kernels of flash-linear-attention)"
    assert told == {"qwen3_5": [line], "nemotron_h": [line], "llama_nemotron": []}


def _told(models: dict[str, ModelConfig]) -> dict[str, list[str]]:
    found = {}
    with megatron.open_world(ParallelConfig(), device="cpu", timeout_s=60) as world:
        for name, model in models.items():
            run = run_config(model, ParallelConfig())
            lines = [choice.line for choice in choices(run, world, megatron.build(run, world, None))]
            found[name] = [line for line in lines if line.startswith("layers with a state")]
    return found
