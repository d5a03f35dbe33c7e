"""Experts in place of the MLP: which settings, router, dispatcher and modules Megatron builds them with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    router_gating_linear,
    sinkhorn,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mbfn.config.layers import feed_forward
from mbfn.config.model import ModelConfig, MoEConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.table import Impl
from mbfn.megatron.device import attributes
from mbfn.megatron.experts import Duplicated, biased_experts
from mbfn.megatron.own_products import capability, obstacle


def moe_settings(model: ModelConfig, parallel: ParallelConfig, *, impl: Impl, cpu: bool) -> dict[str, Any]:
    """Megatron's settings of the experts; none for a dense model."""
    moe = model.moe
    if moe is None:
        return {}
    sparse = [int(feed_forward(model, layer) == "moe") for layer in range(model.num_layers)]
    te = impl == "te"
    return {
        "num_moe_experts": moe.num_moe_experts,
        "moe_router_topk": moe.moe_router_topk,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": moe.moe_shared_expert_gate,
        "moe_latent_size": moe.moe_latent_size or None,
        "moe_layer_freq": 1 if all(sparse) else sparse,  # a list also names a checkpoint's layers one by one
        "moe_router_score_function": moe.moe_router_score_function,
        "moe_router_pre_softmax": moe.moe_router_pre_softmax,
        "moe_router_enable_expert_bias": moe.moe_router_enable_expert_bias and not biased_softmax(model),
        "moe_router_bias_update_rate": moe.moe_router_bias_update_rate,
        "moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": moe.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff or None,
        "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": moe.moe_token_drop_policy,
        "moe_token_dispatcher_type": _dispatcher(parallel, cpu=cpu),
        "moe_flex_dispatcher_backend": parallel.moe_flex_dispatcher_backend,
        "moe_shared_expert_overlap": parallel.moe_shared_expert_overlap,
        "moe_grouped_gemm": te,
        "moe_permute_fusion": te,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
    }


def biased_softmax(model: ModelConfig) -> bool:
    """Whether a bias moves the choice by softmax scores: Megatron's config takes one for sigmoid alone."""
    moe = model.moe
    return moe is not None and moe.moe_router_enable_expert_bias and moe.moe_router_score_function == "softmax"


def moe_builder(builder: functools.partial, moe: MoEConfig) -> functools.partial:
    """Megatron's builder of the experts, with the layer and router of this module."""
    submodules: MoESubmodules = builder.keywords["submodules"]
    router = functools.partial(
        Router, groups=moe.moe_router_num_groups, group_topk=moe.moe_router_group_topk, biased=moe.add_router_bias
    )
    experts = biased_experts(submodules.experts) if moe.add_expert_bias else submodules.experts
    return functools.partial(Experts, submodules=replace(submodules, router=router, experts=experts))


class Experts(MoELayer):
    """Megatron's layer, whose tokens can also travel over gloo, or stay without the host knowing how many go where."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> None:
        local = {"HAVE_TE": True, "TELinear": Duplicated} if config.transformer_impl == "local" else {}
        experts, dispatcher = _parts(config, submodules.experts)
        with attributes(moe_layer, local):
            super().__init__(config, replace(submodules, experts=experts), layer_number, pg_collection, **more)
        if dispatcher is not None:
            self.token_dispatcher = dispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
            )
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)


def _parts(
    config: TransformerConfig, experts: functools.partial
) -> tuple[functools.partial, type[MoEAlltoAllTokenDispatcher] | None]:
    """Which builder of the experts, and which dispatcher in place of Megatron's."""
    if obstacle(config, capability()) is None:
        from mbfn.megatron.grouped import LocalTokens, own_experts

        own = own_experts(experts)
        if own is not None:
            return own, LocalTokens
    gloo = config.use_cpu_initialization and config.moe_token_dispatcher_type == "alltoall"
    return experts, GlooAllToAll if gloo else None


class GlooAllToAll(MoEAlltoAllTokenDispatcher):
    """The dispatcher whose split sizes lie on the host from the start: Megatron moves none that are there already."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                sizes = getattr(self, name)
                setattr(self, name, sizes.numpy() if isinstance(sizes, Tensor) else sizes)
        return tokens_per_expert


class Router(TopKRouter):
    """Megatron's router, that chooses groups of experts as transformers does, by biased scores of every kind.

    Megatron scores a group by its best topk / group_topk experts; DeepSeek-V3 by its best two, DeepSeek-V2 by the best.
    The bias stays in fp32. Megatron's sinkhorn weighs the chosen by a softmax over all; here it chooses, in training,
    and the model's own rule weighs.
    """

    expert_bias: Tensor | None

    def __init__(self, *args: Any, groups: int, group_topk: int, biased: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups, self.group_topk = groups, group_topk
        if biased:
            self.bias = torch.nn.Parameter(torch.zeros_like(self.weight[:, 0]))
            self.bias.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002
        """Logits in fp32. Shapes: (S, B, H) -> (S, B, E).

        Transformer Engine's product with an output in fp32 takes a bias of 16 bits for one of 32.
        """
        if self.bias is None:
            return super().gating(input)
        return router_gating_linear(input, self.weight, None, torch.float32) + self.bias.float()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and map of the chosen experts. Shapes: logits (S, B, E) -> twice (S * B, E)."""
        plain = self.groups == 1 and self.routing_type != "sinkhorn"
        if plain and (self.expert_bias is None or self.score_function == "sigmoid"):
            return super().routing(logits, padding_mask)
        length, batch = logits.shape[:2]
        logits = self.apply_z_loss(logits.view(-1, self.num_experts))
        probs, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            precomputed_indices=self._choice(logits),
        )
        if self.config.moe_expert_capacity_factor is not None:
            probs, chosen = apply_router_token_dropping(
                probs,
                chosen,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            mapped, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
            probs = self._apply_aux_loss(probs, scores, mapped)
            probs = self._apply_seq_aux_loss(probs, scores, mapped, length, batch)
            probs = self._apply_global_aux_loss(probs, scores, mapped)
        self._apply_expert_bias(chosen)
        return probs, chosen

    def _choice(self, logits: Tensor) -> Tensor:
        """The experts of each token, from its best groups or balanced. Shapes: (T, E) -> (T, topk)."""
        with torch.no_grad():
            if self.routing_type == "sinkhorn" and self.training:
                return sinkhorn(logits.float()).topk(self.topk, dim=-1).indices
            sigmoid = self.score_function == "sigmoid"
            scores = logits.float().sigmoid() if sigmoid else logits.softmax(-1, dtype=torch.float32)
            if self.expert_bias is not None:
                scores = scores + self.expert_bias
            return grouped_choice(
                scores, topk=self.topk, groups=self.groups, group_topk=self.group_topk, counted=2 if sigmoid else 1
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """A cast of the whole model to bf16 would round the bias before Megatron casts it back."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None:
            self.expert_bias = before.to(self.expert_bias.device)
        return self


def grouped_choice(scores: Tensor, *, topk: int, groups: int, group_topk: int, counted: int) -> Tensor:
    """The `topk` best experts within the `group_topk` groups whose `counted` best experts score most.

    Shapes: (T, E) -> (T, topk)
    """
    of_group = scores.unflatten(-1, (groups, -1)).topk(counted, dim=-1).values.sum(-1)
    best = of_group.topk(group_topk, dim=-1, sorted=False).indices
    closed = torch.ones_like(of_group, dtype=torch.bool).scatter(1, best, False)
    masked = scores.masked_fill(closed.repeat_interleave(scores.size(-1) // groups, dim=-1), -torch.inf)
    return masked.topk(topk, dim=-1, sorted=False).indices


def _dispatcher(parallel: ParallelConfig, *, cpu: bool) -> str:
    """As asked for; with expert tensor parallelism an all-to-all gathers uneven parts, which gloo cannot: all then."""
    kind = parallel.moe_token_dispatcher_type
    return "allgather" if cpu and parallel.etp > 1 and kind == "alltoall" else kind
