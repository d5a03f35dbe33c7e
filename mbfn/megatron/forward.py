"""Logits from a rank's models, at any layout."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from mbfn.megatron.graphs import eager
from mbfn.megatron.kernels import without_buffers
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.modules import zigzag
from mbfn.megatron.rotary import short_context
from mbfn.megatron.world import World

_FEW_SHAPES = 64  # tokens


def logits(
    world: World, chunks: Sequence[LanguageModel], tokens: Tensor, images: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Next-token scores of whole sequences, and images in them, over the real vocabulary, on every rank. Collective.

    Shapes: tokens (B, S) -> (B, S, V)
    """
    padded, cp = _padded(tokens, world, chunks[0]), world.parallel.cp
    positions = zigzag(padded.size(1), cp, world.coordinates.cp).to(world.device)
    with torch.no_grad(), evaluating(chunks):
        own = pass_through(world, chunks, padded.index_select(1, positions), positions, images=images)
    whole = None if own is None else _in_order(over_vocabulary(own, world), world)
    shape = (*padded.shape, chunks[0].unpadded_vocab_size)
    return from_last_stage(whole, shape, world)[:, : tokens.size(1)]


def pass_through(
    world: World,
    chunks: Sequence[LanguageModel],
    tokens: Tensor,
    positions: Tensor,
    *,
    at: slice = slice(None),
    images: Mapping[str, Tensor] | None = None,
) -> Tensor | None:
    """This rank's share of the logits `at` some of its tokens, or None on all but the last stage. Collective.

    Shapes: tokens (B, S), positions (S,) -> (B, S, V / tp)
    """
    parallel, config = world.parallel, chunks[0].config
    passes = parallel.pp if parallel.vpp > 1 else 1  # the interleaved schedule takes no fewer
    schedule = get_forward_backward_func(pp_size=parallel.pp, vp_size=config.virtual_pipeline_model_parallel_size)
    seen = {} if images is None else {"images": {name: x.to(world.device) for name, x in images.items()}}
    outputs = schedule(
        forward_step_func=partial(_forward, tokens, positions[None].expand_as(tokens), at, seen),
        data_iterator=None if len(chunks) == 1 else [None] * len(chunks),
        model=chunks[0] if len(chunks) == 1 else list(chunks),
        num_microbatches=passes,
        seq_length=tokens.size(1) * parallel.cp,
        micro_batch_size=tokens.size(0),
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(pp_group=world.groups.pp, config=config),
        pg_collection=world.groups,
    )
    return outputs[-1] if outputs else None


def over_vocabulary(own: Tensor, world: World) -> Tensor:
    """The shares of tensor-parallel ranks as one tensor. Shapes: (B, S, V / tp) -> (B, S, V)"""
    return torch.cat(_gathered(own, world.groups.tp), dim=-1)


def from_last_stage(whole: Tensor | None, shape: tuple[int, ...], world: World) -> Tensor:
    """What the last stage has, in fp32 and of `shape`, without the padded vocabulary, on every stage. Collective."""
    if whole is None:
        out = torch.empty(shape, dtype=torch.float32, device=world.device)
    else:
        out = whole[..., : shape[-1]].float().contiguous()
    if world.parallel.pp > 1:
        last = dist.get_process_group_ranks(world.groups.pp)[-1]
        dist.broadcast(out, src=last, group=world.groups.pp)
    return out


@contextlib.contextmanager
def evaluating(chunks: Sequence[LanguageModel]) -> Iterator[None]:
    """Inside, the models run as they do outside training."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with without_buffers(chunks), eager(chunks):
            yield
    finally:
        for chunk, before in zip(chunks, training, strict=True):
            chunk.train(before)


def length_multiple(world: World, model: LanguageModel, multiple: int, text: int) -> int:
    """What the length of a pass is to divide by, `multiple` being what ranks need and `text` ending the real tokens.

    On a GPU more, for few shapes to compile kernels for; but not where a text filled up so would be one that a model
    takes differently: turned at other frequencies, or longer than what an index picks.
    """
    wide, config = math.lcm(multiple, _FEW_SHAPES), model.config
    picked = config.dsa_indexer_topk if config.dsa_indexer_n_heads else None
    ends = [end for end in (short_context(model), picked) if end]
    differs = any(text <= end < text + wide for end in ends if end % wide)
    return multiple if world.device.type == "cpu" or differs else wide


def _padded(tokens: Tensor, world: World, model: LanguageModel) -> Tensor:
    """Tokens, padded to a length that sequence and context parallelism can cut; the causal mask hides the rest."""
    parallel, length = world.parallel, tokens.size(1)
    needed = (2 * parallel.cp if parallel.cp > 1 else 1) * (parallel.tp if parallel.sequence_parallel else 1)
    missing = -length % length_multiple(world, model, needed, length)
    return torch.nn.functional.pad(tokens.to(world.device), (0, missing))


def _forward(
    tokens: Tensor, positions: Tensor, at: slice, seen: Mapping[str, Any], _: Iterator | None, model: LanguageModel
) -> tuple[Tensor, Callable]:
    return model(tokens, positions, None, **seen), partial(_some, at)


def _some(at: slice, output: Tensor, *, non_loss_data: bool) -> Tensor:
    del non_loss_data
    return output[:, at]


def _in_order(scores: Tensor, world: World) -> Tensor:
    """The sequence that context-parallel ranks hold chunks of."""
    cp = world.parallel.cp
    if cp == 1:
        return scores
    scores = torch.cat(_gathered(scores, world.groups.cp), dim=1)
    order = torch.cat([zigzag(scores.size(1), cp, rank) for rank in range(cp)])
    return scores.index_select(1, order.argsort().to(scores.device))


def _gathered(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [own]
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts
