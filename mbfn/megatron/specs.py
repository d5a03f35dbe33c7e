"""The layer spec of a model: which module stands where, and which linears have a bias."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mbfn.config.model import ModelConfig
from mbfn.megatron.modules import Attention, RMSNorm
from mbfn.megatron.settings import Impl


def block_spec(model: ModelConfig, num_layers: int, impl: Impl) -> TransformerBlockSubmodules:
    """The spec of `num_layers` decoder layers and the final norm."""
    layer = ModuleSpec(module=TransformerLayer, submodules=layer_submodules(model, impl))
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=_final_norm(impl))


def layer_submodules(model: ModelConfig, impl: Impl) -> TransformerLayerSubmodules:
    """One decoder layer of `model`."""
    if impl == "te":
        layer = get_gpt_layer_with_transformer_engine_submodules(qk_layernorm=model.qk_layernorm)
    else:
        layer = get_gpt_layer_local_submodules(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
        layer = _on_torch(layer, qk_layernorm=model.qk_layernorm)
    return _with_biases(layer, model)


def _on_torch(layer: TransformerLayerSubmodules, *, qk_layernorm: bool) -> TransformerLayerSubmodules:
    parts = replace(layer.self_attention.submodules, core_attention=Attention)
    if qk_layernorm:
        parts = replace(parts, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    attention = replace(layer.self_attention, submodules=parts)
    return replace(layer, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm, self_attention=attention)


def _with_biases(layer: TransformerLayerSubmodules, model: ModelConfig) -> TransformerLayerSubmodules:
    """Give the output projection and the MLP their biases apart: Megatron's config has one switch for both."""
    parts = layer.self_attention.submodules
    parts = replace(parts, linear_proj=_biased(parts.linear_proj, bias=model.add_proj_bias))
    mlp = layer.mlp.keywords["submodules"]
    mlp = replace(
        mlp,
        linear_fc1=_biased(mlp.linear_fc1, bias=model.add_mlp_bias),
        linear_fc2=_biased(mlp.linear_fc2, bias=model.add_mlp_bias),
    )
    return replace(
        layer,
        self_attention=replace(layer.self_attention, submodules=parts),
        mlp=functools.partial(layer.mlp.func, **{**layer.mlp.keywords, "submodules": mlp}),
    )


def _biased(builder: Callable, *, bias: bool) -> Callable:
    def build(*args: Any, **kwargs: Any) -> Any:
        return builder(*args, **{**kwargs, "bias": bias})

    return build if bias else builder


def _final_norm(impl: Impl) -> Any:
    if impl == "local":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
