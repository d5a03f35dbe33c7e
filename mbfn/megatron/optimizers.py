"""Megatron's optimizers as a run asks for them, and the rates of its parameter groups."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import megatron.core.optimizer as core_optimizer
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from mbfn.config.optim import OptimConfig
from mbfn.config.run import RunConfig
from mbfn.convert.table import Impl
from mbfn.errors import ConfigError, LaunchError
from mbfn.megatron.adam import one_pass_adam, updates_in_one_pass
from mbfn.megatron.device import attributes
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.optimizer_state import parts_of
from mbfn.megatron.precision import optimizer_settings
from mbfn.megatron.settings import DTYPES, cuts_states
from mbfn.megatron.world import World

_NAMES = {"adamw": "adam", "muon": "muon", "sgd": "sgd"}
_EMBEDDING = "embedding.word_embeddings.weight"
Multipliers = tuple[float, float]  # of the learning rate and of the weight decay


def make_optimizer(
    run: RunConfig, world: World, chunks: Sequence[LanguageModel], ddp: Sequence[DistributedDataParallel], *, impl: Impl
) -> MegatronOptimizer:
    """The optimizer of this rank's weights. Collective.

    Raises: LaunchError for Muon where its package is not installed; ConfigError for a rule that fits no weight.
    """
    if run.optim.optimizer == "muon" and importlib.util.find_spec("emerging_optimizers") is None:
        raise LaunchError("optim.optimizer: Muon is in the package emerging-optimizers; install it, or use adamw")
    named = list(_named(chunks))
    _check_rules(run.optim, [name for name, _ in named])
    one_pass, max_norm = updates_in_one_pass(run, impl), run.optim.clip_grad or math.inf
    with attributes(core_optimizer, {"Adam": one_pass_adam(max_norm)} if one_pass else {}):
        return get_megatron_optimizer(
            optimizer_config(run, clip_grad=0.0 if one_pass else max_norm),
            list(ddp),
            config_overrides=_overrides(run.optim, named),
            use_gloo_process_groups=False,
            pg_collection=world.groups,
        )


def optimizer_config(run: RunConfig, *, clip_grad: float) -> OptimizerConfig:
    """The optimizer and its number formats. An infinite clip measures the gradient norm; 0 leaves both to others."""
    optim, precision = run.optim, run.precision
    fields: dict[str, Any] = {f"muon_{name}": value for name, value in asdict(optim.muon).items()}
    if precision.precision_aware:
        fields |= {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": DTYPES[precision.grads],
            "main_params_dtype": DTYPES[precision.main_params],
            "exp_avg_dtype": DTYPES[precision.exp_avg],
            "exp_avg_sq_dtype": DTYPES[precision.exp_avg_sq],
        }
    fields |= optimizer_settings(precision)
    if optim.optimizer_offload_fraction:
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": optim.optimizer_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": optim.overlap_cpu_optimizer_d2h_h2d,
        }
    return OptimizerConfig(
        optimizer=_NAMES[optim.optimizer],
        lr=1.0,  # a group's rates are multipliers: `set_rates` gives the rest at each step
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        sgd_momentum=optim.sgd_momentum,
        clip_grad=clip_grad,
        bf16=precision.params == "bf16" and run.parallel.sharding != "fsdp2",  # which cuts the fp32 weights
        fp16=precision.params == "fp16",
        params_dtype=DTYPES[precision.params],
        loss_scale=optim.loss_scale,
        initial_loss_scale=optim.initial_loss_scale,
        min_loss_scale=optim.min_loss_scale,
        loss_scale_window=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
        use_distributed_optimizer=cuts_states(run),
        overlap_param_gather=optim.overlap_param_gather,
        **fields,
    )


def set_rates(optimizer: MegatronOptimizer, *, lr: float, weight_decay: float) -> None:
    """Learning rate and weight decay of the next step; Megatron leaves the groups' multipliers to its scheduler."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def loss_scale(optimizer: MegatronOptimizer) -> float | None:
    """What the next step's loss is multiplied by; none without loss scaling."""
    scalers = [getattr(part, "grad_scaler", None) for part in parts_of(optimizer)]
    return next((float(scaler.scale) for scaler in scalers if scaler is not None), None)


def multipliers(optim: OptimConfig, name: str, param: torch.Tensor) -> Multipliers:
    """Those of one weight: what its rules multiply to, and no decay of vectors unless the run wants it."""
    vector = param.dim() == 1 or name.endswith(".bias")
    rate, decay = 1.0, 0.0 if vector and not optim.decay_norms_and_biases else 1.0
    for rule in optim.rules:
        if fnmatchcase(name, rule.pattern):
            rate, decay = rate * rule.lr_mult, decay * rule.wd_mult
    return rate, decay


def _overrides(optim: OptimConfig, named: list[tuple[str, torch.nn.Parameter]]) -> dict[ParamKey, Any]:
    """A group of weights for each pair of multipliers but (1, 1), which needs none."""
    own = {param: multipliers(optim, name, param) for name, param in named}
    found = sorted(set(own.values()) - {(1.0, 1.0)})
    return {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=str(pair), fn=partial(_has, optim, own, pair))): {
            "wd_mult": pair[1],
            "lr_mult": pair[0],
            "max_lr": pair[0],  # Megatron tells groups of a checkpoint apart by this field, not by `lr_mult`
        }
        for pair in found
    }


def _has(
    optim: OptimConfig,
    own: dict[torch.nn.Parameter, Multipliers],
    pair: Multipliers,
    param: torch.nn.Parameter,
    name: str,
) -> bool:
    """Whether a weight has these multipliers. A wrapper that cuts weights shows its own in place of the model's."""
    found = own.get(param) or multipliers(optim, name.rpartition("module.")[2], param)
    return found == pair


def _named(chunks: Sequence[LanguageModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's weights by the names of the whole model: layers counted from its first, tied embeddings by one."""
    for chunk in chunks:
        first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, param in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                number, _, rest = name.removeprefix("decoder.layers.").partition(".")
                name = f"decoder.layers.{int(number) + first}.{rest}"
            yield _EMBEDDING if getattr(param, "shared_embedding", False) else name, param


def _check_rules(optim: OptimConfig, names: list[str]) -> None:
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names if optim.rules else [])
    everything = {name for part in gathered for name in part}
    problems = [
        (f"optim.rules[{number}].pattern", f"{rule.pattern!r} fits no weight; names are such as {_EMBEDDING}")
        for number, rule in enumerate(optim.rules)
        if not any(fnmatchcase(name, rule.pattern) for name in everything)
    ]
    if problems:
        raise ConfigError(problems)
