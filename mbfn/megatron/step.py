"""One forward and backward pass over the micro-batches of a step, and one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from mbfn.config.run import RunConfig
from mbfn.megatron.modules import zigzag
from mbfn.megatron.optimizer import Models, set_rates, zero_gradients
from mbfn.megatron.world import World

MicroBatch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step was: the same on every rank."""

    loss: float  # mean over the tokens of the global batch, before the update
    grad_norm: float  # of the whole gradient, before clipping
    tokens: int  # that the loss counted
    skipped: bool  # fp16 overflow: the weights did not change


def train_step(
    run: RunConfig, world: World, models: Models, micro_batches: Sequence[MicroBatch], *, lr: float
) -> StepResult:
    """Update the weights once from this data-parallel rank's micro-batches of whole sequences. Collective."""
    set_rates(models.optimizer, lr=lr, weight_decay=run.optim.weight_decay)
    zero_gradients(models)
    loss_sum, tokens = forward_backward(run, world, models, micro_batches, forward_only=False)
    done, norm, _ = models.optimizer.step()
    return StepResult(
        loss=loss_sum / max(tokens, 1),
        grad_norm=math.nan if norm is None else float(norm),
        tokens=tokens,
        skipped=not done,
    )


def eval_step(run: RunConfig, world: World, models: Models, micro_batches: Sequence[MicroBatch]) -> float:
    """The mean token loss of a global batch; changes nothing. Collective."""
    for ddp in models.ddp:
        ddp.eval()
    with torch.no_grad():
        loss_sum, tokens = forward_backward(run, world, models, micro_batches, forward_only=True)
    for ddp in models.ddp:
        ddp.train()
    return loss_sum / max(tokens, 1)


def forward_backward(
    run: RunConfig, world: World, models: Models, micro_batches: Sequence[MicroBatch], *, forward_only: bool
) -> tuple[float, int]:
    """Loss summed over the global batch's tokens, and their number, on every rank; gradients are of the mean.

    Shapes: each micro-batch has tokens, labels, position_ids (B, S) int64 and loss_mask (B, S).
    """
    schedule = get_forward_backward_func(
        pp_size=run.parallel.pp, vp_size=models.config.virtual_pipeline_model_parallel_size
    )
    own = [_slice(batch, world) for batch in micro_batches]
    single = len(models.ddp) == 1
    records = schedule(
        forward_step_func=_forward_step,
        data_iterator=iter(own) if single else [iter(own) for _ in models.ddp],
        model=models.ddp[0] if single else list(models.ddp),
        num_microbatches=len(own),
        seq_length=run.train.seq_length,
        micro_batch_size=run.train.micro_batch_size,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(pp_group=world.groups.pp, config=models.config),
        pg_collection=world.groups,
    )
    return _total(records, world)


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return losses, partial(_loss, batch["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum and count, which Megatron divides once for the whole step: exact however tokens fall into micro-batches."""
    total = (losses.float() * mask).sum()
    count = mask.sum()
    record = {"loss": total.detach().double(), "tokens": count.double()}
    return total, count.to(torch.int), record


def _total(records: list[dict[str, Tensor]], world: World) -> tuple[float, int]:
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    totals = torch.stack([sum((r[key] for r in records), zero) for key in ("loss", "tokens")])
    dist.all_reduce(totals, group=world.groups.dp_cp)
    dist.all_reduce(totals, group=world.groups.pp)  # only the last stage has records
    loss, tokens = totals.tolist()
    return loss, int(tokens)


def _slice(batch: MicroBatch, world: World) -> dict[str, Any]:
    """The part of the sequences that this context-parallel rank works on, on its device."""
    place, size = world.coordinates.cp, world.parallel.cp
    moved = {name: value.to(world.device, non_blocking=True) for name, value in batch.items()}
    moved["loss_mask"] = moved["loss_mask"].float()
    if size == 1:
        return moved
    positions = zigzag(batch["tokens"].size(1), size, place).to(world.device)
    return {name: value.index_select(1, positions) for name, value in moved.items()}
