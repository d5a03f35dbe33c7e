"""Models that are only looked at: a teacher, a reference. They are cut as the model that trains beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from mbfn.config.run import RunConfig
from mbfn.megatron.build import build_model
from mbfn.megatron.losses import MicroBatch, Sums, scores
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.world import World

Batch = dict[str, Any]
Kept = Callable[[Tensor, MicroBatch], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frozen:
    """A rank's part of a model without gradients."""

    chunks: tuple[LanguageModel, ...]
    world: World


def open_frozen(run: RunConfig, world: World, weights: Mapping[str, Tensor] | None) -> Frozen:
    """The model of `run`, with `weights` as `mbfn.to_megatron` gives them for this rank. Collective."""
    chunks = build_model(run, world, weights)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return Frozen(chunks=chunks, world=world)


def looking(
    frozen: Frozen,
    keep: Kept,
    *,
    forward: Callable[[nn.Module, MicroBatch], tuple[Tensor, Sums]] = scores,
    layers: Sequence[int] = (),
) -> Callable[[Iterable[Batch]], Iterable[Batch]]:
    """`Loss.prepare` that adds to micro-batches what `keep` makes of the model's outputs, on the last stage.

    `layers` (from 0) add their outputs as `hidden.LAYER` on the stages that hold them. Without pipeline stages
    the model looks at a micro-batch when it is its turn; with them at all of a step first, and what is kept lies in
    memory until then.
    """

    def prepare(batches: Iterable[Batch]) -> Iterable[Batch]:
        look = partial(_looked, frozen, keep, forward, layers)
        if frozen.world.parallel.pp > 1:
            return look(list(batches))
        return (look([batch])[0] for batch in batches)

    return prepare


def _looked(frozen: Frozen, keep: Kept, forward: Callable, layers: Sequence[int], batches: list[Batch]) -> list[Batch]:
    world, config, single = frozen.world, frozen.chunks[0].config, len(frozen.chunks) == 1
    found: list[Batch] = [{} for _ in batches]
    step = partial(_step, keep, forward, layers)
    schedule = get_forward_backward_func(pp_size=world.parallel.pp, vp_size=config.virtual_pipeline_model_parallel_size)
    pairs = list(zip(batches, found, strict=True))
    with torch.no_grad():
        schedule(
            forward_step_func=step,
            data_iterator=iter(pairs) if single else [iter(pairs) for _ in frozen.chunks],
            model=frozen.chunks[0] if single else list(frozen.chunks),
            num_microbatches=len(batches),
            seq_length=batches[0]["tokens"].size(1) * world.parallel.cp,
            micro_batch_size=batches[0]["tokens"].size(0),
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(pp_group=world.groups.pp, config=config),
            pg_collection=world.groups,
        )
    return [batch | new for batch, new in pairs]


def _step(
    keep: Kept, forward: Callable, layers: Sequence[int], pairs: Iterator[tuple[Batch, Batch]], model: LanguageModel
) -> tuple[Tensor, Callable]:
    batch, found = next(pairs)

    def note(layer: int, hidden: Tensor) -> Tensor:
        found[f"hidden.{layer}"] = hidden.clone()  # the schedule frees what it has sent
        return hidden

    def measure(output: Tensor, *, non_loss_data: bool) -> None:
        del non_loss_data
        found.update(keep(output, batch))

    with watched(model, layers, note):
        return forward(model, batch)[0], measure


@contextlib.contextmanager
def watched(model: nn.Module, layers: Sequence[int], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, what decoder `layers` (from 0) of this stage give is what `change` makes of it."""

    def hook(layer: int, _: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        hidden, context = output
        changed = change(layer, hidden)
        return make_viewless_tensor(changed, requires_grad=changed.requires_grad, keep_graph=True), context

    held = {layer.layer_number - 1: layer for layer in bare(model).decoder.layers}
    handles = [held[i].register_forward_hook(partial(hook, i)) for i in layers if i in held]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bare(model: nn.Module) -> LanguageModel:
    """The model inside the wrappers of gradients and number formats."""
    while not isinstance(model, LanguageModel):
        model = model.module  # type: ignore[assignment]
    return model
