"""Learning from a teacher: its next-token distributions, their best tokens, and what its layers give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbfn.megatron.divergence import Shard, best, divergence, label_losses, sparse_divergence
from mbfn.megatron.frozen import Frozen, bare, looking, watched
from mbfn.megatron.losses import Loss, MicroBatch, Sums, Term, scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What is learned from the teacher, and how much."""

    temperature: float = 1.0
    top_k: int = 0  # best tokens of the teacher that count; 0: all
    token_share: float = 0.0  # of the labels' cross entropy in the loss; the rest is the teacher's
    hidden_layers: Sequence[tuple[int, int]] = ()  # a layer, and the teacher's that it is to be like
    hidden_weight: float = 1.0


def distillation(settings: Distillation, teacher: Frozen, *, vocab_size: int) -> Loss:
    """The loss that `settings` name, for a model cut as `teacher` is.

    Each token's is `(1 - token_share) * T^2 KL(teacher || model) + token_share * cross entropy`, and `hidden_weight`
    times the mean squared distance of each pair of layers.
    """
    world = teacher.world
    shard = Shard(size=vocab_size, group=world.groups.tp)
    keep = partial(_kept, settings.top_k, shard)
    layers = [layer for _, layer in settings.hidden_layers]
    own = dict(settings.hidden_layers)
    hidden = partial(_with_hidden, own, settings.hidden_weight, world.groups.tp)
    return Loss(
        function=partial(_term, settings, shard),
        forward=hidden if own else scores,
        prepare=looking(teacher, keep, layers=layers),
        metrics=("distillation", "cross_entropy", *(["hidden"] if own else [])),
    )


def _kept(top_k: int, shard: Shard, output: Tensor, _: MicroBatch) -> dict[str, Tensor]:
    if not top_k:
        return {"teacher_scores": output}
    values, ids = best(output, top_k, shard)
    return {"teacher_values": values, "teacher_ids": ids}


def _term(settings: Distillation, shard: Shard, output: Tensor, batch: MicroBatch) -> Term:
    mask, temperature = batch["loss_mask"], settings.temperature
    if settings.top_k:
        values, ids = batch["teacher_values"], batch["teacher_ids"]
        apart = sparse_divergence(output, values, ids, shard, temperature=temperature)
    else:
        apart = divergence(output, batch["teacher_scores"], shard, temperature=temperature)
    taught, said = (apart * mask).sum(), (label_losses(output, batch["labels"], shard) * mask).sum()
    total = (1 - settings.token_share) * taught + settings.token_share * said
    metrics = {"distillation": taught.detach(), "cross_entropy": said.detach()}
    return Term(total=total, weight=mask.sum(), metrics=metrics)


def _with_hidden(
    pairs: dict[int, int], weight: float, tp: dist.ProcessGroup, model: nn.Module, batch: MicroBatch
) -> tuple[Tensor, Sums]:
    """The scores; the distances of this stage's layers are added to the loss where they are measured."""
    config = bare(model).config
    scale = config.grad_scale_func(torch.ones((), device=batch["tokens"].device)) if config.grad_scale_func else None
    distances: list[Tensor] = []

    def compare(layer: int, hidden: Tensor) -> Tensor:
        mask = batch["loss_mask"].t()
        if config.sequence_parallel:
            mask = mask.chunk(tp.size())[tp.rank()]
        apart = (hidden.float() - batch[f"hidden.{pairs[layer]}"].float()).square().mean(-1)
        distance = (apart * mask).sum()
        distances.append(distance.detach())
        return _Adding.apply(hidden, weight * distance, scale)

    with watched(model, list(pairs), compare):
        output, _ = scores(model, batch)
    total = sum(distances, torch.zeros((), device=output.device))
    if config.sequence_parallel and distances:
        dist.all_reduce(total, group=tp)
    return output, {"hidden": total, "loss": weight * total}


class _Adding(torch.autograd.Function):
    """The hidden state, and in the backward pass the gradient of `loss` as a part of the whole loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: Tensor | None) -> Tensor:
        ctx.scale = torch.ones_like(loss) if scale is None else scale.to(loss.dtype)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.scale, None
