"""What a run became on the device at hand: each choice of modules, kernels and overlaps, with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mbfn.config.recipes import resolved_precision
from mbfn.config.run import RunConfig
from mbfn.megatron.adam import updates_in_one_pass
from mbfn.megatron.optimizer import Models
from mbfn.megatron.own_products import told
from mbfn.megatron.scans import choose_scans
from mbfn.megatron.world import World

_NO_TE = "of Transformer Engine, which needs a CUDA GPU and its package"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One thing that was decided when the run started."""

    name: str
    value: str
    reason: str

    @property
    def line(self) -> str:
        """For a person."""
        return f"{self.name}: {self.value} ({self.reason})"


def choices(run: RunConfig, world: World, models: Models) -> tuple[Choice, ...]:
    """Every choice, the widest first."""
    return tuple(
        Choice(name=name, value=value, reason=reason)
        for part in (
            _modules(models),
            _formats(run, world),
            _kernels(run, models),
            _scans(run, world, models.config),
            _experts(models),
            _optimizer(run, models),
        )
        for name, value, reason in part
    )


def opening(found: tuple[Choice, ...]) -> str:
    """The choices without their reasons, for the first lines of a run."""
    return ", ".join(f"{choice.name} {choice.value}" for choice in found)


def held(run: RunConfig) -> str:
    """Which optimizer, and what of it a rank holds."""
    return f"{run.optim.optimizer}, states {_share(run)}"


def _share(run: RunConfig) -> str:
    parallel = run.parallel
    ranks = parallel.data_parallel_size * parallel.cp // parallel.num_distributed_optimizer_instances
    if ranks == 1 or parallel.sharding == "none":
        return "whole"
    also = "with weights and gradients " if "fsdp" in parallel.sharding else ""
    return f"cut {also}over {ranks} ranks ({parallel.sharding})"


def _modules(models: Models) -> Iterator[tuple[str, str, str]]:
    te = models.impl == "te"
    yield (
        "modules",
        "Transformer Engine" if te else "torch",
        "a CUDA GPU with Transformer Engine" if te else "no CUDA GPU with Transformer Engine here",
    )


def _formats(run: RunConfig, world: World) -> Iterator[tuple[str, str, str]]:
    precision, reason = run.precision, "as configured"
    if precision.quantized and world.device.type == "cuda":
        capability = torch.cuda.get_device_capability(world.device)
        name = torch.cuda.get_device_name(world.device)
        precision, reason = resolved_precision(precision, capability, name)
    yield "products", precision.fp8 if precision.quantized else precision.params, reason
    kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    if kept:
        yield "layers in bf16", str(kept), "precision.num_layers_at_start_in_bf16, num_layers_at_end_in_bf16"
    if precision.fp8_attention != "none":
        yield "attention in FP8", precision.fp8_attention, "precision.fp8_attention"
    if precision.quantized:
        told = "precision.fp8_output_proj" if precision.fp8_output_proj else "its logits decide the loss"
        yield "output layer", precision.fp8 if precision.fp8_output_proj else precision.params, told


def _kernels(run: RunConfig, models: Models) -> Iterator[tuple[str, str, str]]:
    te, config, model = models.impl == "te", models.config, run.model
    if te and not model.attn_logit_softcapping:
        yield "attention", "fused", "Transformer Engine takes cuDNN's or flash-attn's kernel for these shapes"
    else:
        why = "Transformer Engine's has no soft cap" if te else f"the fused one is {_NO_TE}"
        yield "attention", "blocks of queries", why
    yield "rotary embedding", *_fused(config.apply_rope_fusion, "the fused kernel has no factor of yarn", te)
    if config.fused_single_qkv_rope:
        yield "queries and keys", "rotated in place", "fusion.fused_single_qkv_rope"
    on_gpu = bool(config.bias_activation_fusion)
    why = "compiled by torch; SwiGLU's gradient in a Triton kernel" if on_gpu else "no GPU to compile it for"
    yield "activation", "fused" if on_gpu else "plain", why
    yield "cross entropy", config.cross_entropy_fusion_impl, "one kernel over the logits" if te else _NO_TE
    yield (
        "weight gradients",
        *_fused(config.gradient_accumulation_fusion, "", te, "the product adds to the gradient buffer, without Apex"),
    )
    graphs = config.cuda_graph_impl
    why = "train.cuda_graph_impl" if graphs != "none" else "kernels fill 98.7% of a step of 1B parameters on an H200"
    yield "CUDA graphs", graphs, why
    yield "recompute", run.train.recompute, "train.recompute"


def _scans(run: RunConfig, world: World, config: TransformerConfig) -> Iterator[tuple[str, str, str]]:
    for sizes in (run.model.mamba, run.model.gdn):
        if sizes is not None:
            scans, why = choose_scans(world.device, config.params_dtype, sizes.head_sizes)
            yield "layers with a state", scans.name, why


def _experts(models: Models) -> Iterator[tuple[str, str, str]]:
    config = models.config
    if config.num_moe_experts is None:
        return
    grouped, fused = bool(config.moe_grouped_gemm), bool(config.moe_router_fusion)
    own, why = told(config, models.chunks)
    why = why if grouped else _NO_TE
    yield "experts", ("own " if own else "") + "grouped products" if grouped else "one by one", why
    yield "dispatcher", config.moe_token_dispatcher_type, "parallel.moe_token_dispatcher_type"
    yield "router", "fused" if fused else "plain", "fusion.moe_router_fusion"


def _optimizer(run: RunConfig, models: Models) -> Iterator[tuple[str, str, str]]:
    precision, ranks = run.precision, run.parallel.data_parallel_size * run.parallel.cp
    states = "precision-aware" if precision.precision_aware else "fp32 states"
    why = f"moments {precision.exp_avg}, {precision.exp_avg_sq}; master weights {precision.main_params}"
    yield "optimizer", f"{run.optim.optimizer} with {states}", why
    if updates_in_one_pass(run, models.impl):
        yield "update", "one pass", "clipping, moments and weights in one Triton kernel, every byte once"
    else:
        yield (
            "update",
            "pass by pass",
            "the kernel of one pass is for AdamW on a GPU, uncut or cut by zero1, no FP8 weights",
        )
    yield "optimizer state", _share(run), "one rank" if ranks == 1 else f"parallel.sharding={run.parallel.sharding}"
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        wanted = getattr(run.optim, name)
        why = "one data-parallel rank has nothing to send" if ranks == 1 else f"optim.{name}={str(wanted).lower()}"
        yield name.replace("_", " "), "on" if wanted else "off", why


def _fused(on: bool, other: str, te: bool, why: str = "Transformer Engine's kernel") -> tuple[str, str]:
    if on:
        return "fused", why
    return "plain", other if te and other else _NO_TE
