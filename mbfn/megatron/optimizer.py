"""Gradient reduction and the optimizer round a rank's model chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from mbfn.config.run import RunConfig
from mbfn.megatron.fsdp import FullyShardedDataParallel, megatron_fsdp
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.optimizer_state import prime
from mbfn.megatron.optimizers import make_optimizer
from mbfn.megatron.settings import Impl, ddp_config
from mbfn.megatron.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What one rank trains. Megatron updates weights and optimizer in place: after a step this is the new state."""

    chunks: tuple[LanguageModel, ...]  # the bare models, one a virtual pipeline stage
    ddp: tuple[DistributedDataParallel, ...]  # the same, wrapped for gradient reduction
    optimizer: MegatronOptimizer
    config: TransformerConfig
    impl: Impl


def wrap(
    run: RunConfig, world: World, chunks: Sequence[LanguageModel], config: TransformerConfig, *, impl: Impl
) -> Models:
    """Gradient buffers and optimizer for `chunks`, whose weights are set. Collective."""
    reduce = ddp_config(run)
    half = config.bf16 or config.fp16
    bodies = [Float16Module(config, chunk) if half else chunk for chunk in chunks]
    ddp: tuple[Any, ...]
    if run.parallel.sharding == "fsdp2":
        ddp = tuple(FullyShardedDataParallel(config, reduce, body, world.groups.dp_cp) for body in bodies)
    elif run.parallel.sharding == "megatron_fsdp":
        ddp = tuple(megatron_fsdp(config, reduce, body, world.groups, world.device) for body in bodies)
    else:
        ddp = tuple(
            DistributedDataParallel(config, reduce, body, disable_bucketing=i > 0, pg_collection=world.groups)
            for i, body in enumerate(bodies)
        )
    optimizer = make_optimizer(run, world, chunks, ddp, impl=impl)
    prime(optimizer)
    _hook(config, ddp, optimizer, overlap=run.optim.overlap_grad_reduce, gather=run.optim.overlap_param_gather)
    return Models(chunks=tuple(chunks), ddp=ddp, optimizer=optimizer, config=config, impl=impl)


@contextlib.contextmanager
def gathered(models: Models) -> Iterator[None]:
    """Inside, the weights are those of the last step even where their gathering overlaps the next forward pass."""
    for ddp in models.ddp:
        if ddp.ddp_config.use_megatron_fsdp:
            ddp.module._replace_param_with_distributed_if_needed()
    overlapped = [
        ddp for ddp in models.ddp if isinstance(ddp, DistributedDataParallel) and ddp.ddp_config.overlap_param_gather
    ]
    for ddp in overlapped:
        ddp.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for ddp in overlapped:
            ddp.enable_forward_pre_hook()


def spread_weights(models: Models) -> None:
    """After the weights that an optimizer updates were set from outside, make the model's own of them."""
    for ddp in models.ddp:
        if ddp.ddp_config.use_megatron_fsdp:
            ddp.module.install_optimized_model_weights()


def _hook(
    config: TransformerConfig,
    ddp: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    overlap: bool,
    gather: bool,
) -> None:
    """The functions that Megatron's schedules look for on the model's config."""
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = _one_or_list([model.no_sync for model in ddp])
    if overlap:
        config.grad_sync_func = _one_or_list([model.start_grad_sync for model in ddp])
    if gather:
        config.param_sync_func = _one_or_list([model.start_param_sync for model in ddp])


def _one_or_list(functions: list) -> object:
    return functions if len(functions) > 1 else functions[0]


def zero_gradients(models: Models) -> None:
    """Forget the gradients of the last step."""
    for ddp in models.ddp:
        ddp.zero_grad_buffer()
    models.optimizer.zero_grad()
