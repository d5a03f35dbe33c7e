"""Attention written out, for what torch's fused kernels lack: soft caps and sinks."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped queries, its scores and weights in fp32.

    Scores are capped to `softcap * tanh(score / softcap)`; each head's sink is one more score, that of a key whose
    value is zero. Takes memory for all scores.

    Shapes: query (B, N, S, D), key and value (B, G, K, D), seen (S, K) bool, sinks (N,) -> (B, N, S, D).
    """
    groups = key.size(1)
    scores = query.unflatten(1, (groups, -1)) @ key.unsqueeze(2).transpose(-1, -2)  # (B, G, N / G, S, K)
    scores = scores.float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.size(2)]
    return (weights.to(value.dtype) @ value.unsqueeze(2)).flatten(1, 2)
