"""Distances between next-token distributions whose vocabulary is cut over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NEVER = -1e30  # a score that no token is drawn with; finite, so that products with it are no NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The part of a vocabulary of `size` tokens that a tensor-parallel rank holds; what lies beyond is padding."""

    size: int
    group: dist.ProcessGroup


def divergence(scores: Tensor, teacher: Tensor, shard: Shard, *, temperature: float = 1.0) -> Tensor:
    """KL divergence of the teacher's distribution from the model's, times the temperature squared.

    The square keeps the gradient's size at every temperature (arXiv:1503.02531, section 2.1).

    Shapes: both (B, S, V / tp) -> (B, S).
    """
    log_target = _log_softmax(teacher.detach(), shard, temperature)
    return _Divergence.apply(scores, log_target, log_target.exp(), None, (shard, temperature))


def sparse_divergence(scores: Tensor, values: Tensor, ids: Tensor, shard: Shard, *, temperature: float = 1.0) -> Tensor:
    """`divergence` from a teacher of which `values` of its best tokens `ids` are known: the others get no probability.

    Shapes: scores (B, S, V / tp), values and ids (B, S, K), the same on every rank -> (B, S).
    """
    log_target = (values.detach().float() / temperature).log_softmax(-1)
    return _Divergence.apply(scores, log_target, log_target.exp(), ids, (shard, temperature))


def label_losses(scores: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """Cross entropy of each label. Shapes: (B, S, V / tp), (B, S) -> (B, S)."""
    ids = labels[..., None]
    return sparse_divergence(scores, torch.zeros_like(ids, dtype=torch.float32), ids, shard)


def best(scores: Tensor, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each token and whose they are, over all ranks.

    Shapes: (B, S, V / tp) -> twice (B, S, count).
    """
    real = _real(scores, shard)
    values, ids = real.topk(min(count, real.size(-1)), dim=-1)
    ids = ids + shard.group.rank() * scores.size(-1)
    if shard.group.size() > 1:
        values, ids = _gathered(values, shard.group), _gathered(ids, shard.group)
    values, order = values.topk(count, dim=-1)
    return values, ids.gather(-1, order)


class _Divergence(torch.autograd.Function):
    """Keeps the difference of the distributions, which is the gradient, and nothing else of the vocabulary's size."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, log_target: Tensor, target: Tensor, ids: Tensor | None, setting: tuple[Shard, float]
    ) -> Tensor:
        shard, temperature = setting
        found = _log_softmax(scores, shard, temperature)
        difference = found.exp()
        if ids is None:
            total = (target * (log_target - found)).sum(-1)
            _all_reduce(total, shard)
            difference -= target
        else:
            local = ids - shard.group.rank() * scores.size(-1)
            own = (local >= 0) & (local < scores.size(-1))
            local = local.clamp(0, scores.size(-1) - 1)
            at = found.gather(-1, local).masked_fill(~own, 0.0)
            _all_reduce(at, shard)
            total = (target * (log_target - at)).sum(-1)
            difference.scatter_add_(-1, local, -target.masked_fill(~own, 0.0))
        ctx.save_for_backward(difference.to(scores.dtype))
        ctx.temperature = temperature
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return difference * (grads[0] * ctx.temperature).to(difference.dtype)[..., None], None, None, None, None


def _log_softmax(scores: Tensor, shard: Shard, temperature: float) -> Tensor:
    scaled = _real(scores, shard) / temperature
    highest = scaled.amax(-1, keepdim=True)
    _all_reduce(highest, shard, dist.ReduceOp.MAX)
    scaled -= highest
    total = scaled.exp().sum(-1, keepdim=True)
    _all_reduce(total, shard)
    return scaled - total.log()


def _real(scores: Tensor, shard: Shard) -> Tensor:
    """In fp32, a copy; the padding of the vocabulary is never drawn."""
    own = scores.size(-1)
    copy = scores.detach().float().clone()
    copy[..., max(0, shard.size - shard.group.rank() * own) :] = _NEVER
    return copy


def _all_reduce(x: Tensor, shard: Shard, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    if shard.group.size() > 1:
        dist.all_reduce(x, op=op, group=shard.group)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
