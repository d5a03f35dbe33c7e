"""Attention in blocks is the formula, and keeps no scores for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mbfn.megatron.packed import zigzag
from mbfn.megatron.scores import causal_attention

LENGTH = 29


def _formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, softcap: float) -> Tensor:
    """One query of one head at a time."""
    out = torch.zeros_like(q)
    for head in range(q.size(1)):
        group = head // (q.size(1) // k.size(1))
        for at in range(LENGTH):
            first = max(0, at + 1 - window) if window else 0
            scores = (k[0, group, first : at + 1] @ q[0, head, at]) * 0.3
            powers = (softcap * (scores / softcap).tanh() if softcap else scores).exp()
            out[0, head, at] = (powers / (powers.sum() + sinks[head].exp())) @ v[0, group, first : at + 1]
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (7, 0.0), (None, 0.5), (7, 0.5)])
def test_blocks_are_the_formula(window: int | None, softcap: float, ranks: int) -> None:
    draw = torch.Generator().manual_seed(2)
    q, k, v, up = (torch.randn(1, heads, LENGTH, 6, generator=draw).double() for heads in (6, 2, 2, 6))
    sinks = torch.randn(6, generator=draw).double()
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]
    parts, places = [], []
    for rank in range(ranks):
        at = zigzag(LENGTH, ranks, rank)
        places.append(at)
        settings = {"window": window, "scale": 0.3, "softcap": softcap, "sinks": sinks, "block": 5}
        parts.append(causal_attention(q[:, :, at], k, v, at, **settings))
    found = torch.cat(parts, dim=2)[:, :, torch.cat(places).argsort()]
    expected = _formula(q, k, v, sinks, window, softcap)
    assert torch.allclose(found, expected, atol=1e-5)  # scores are fp32
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_no_scores_are_kept() -> None:
    q = torch.randn(1, 2, 512, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        causal_attention(q, q, q, torch.arange(512), window=None, scale=1.0, softcap=2.0, block=64)
    assert sum(kept) < 512 * 512
