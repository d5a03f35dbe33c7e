"""Where a model's layer specification lets others stand in for its linears, before anything is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

Adapt = Callable[[str, type], type]
"""The class that stands in for a linear's, by the module's path in the whole model."""

MARK = ".adapter."  # in the name of every tensor that an adaptation adds
DOWN = ("linear_q_down_proj", "linear_kv_down_proj")  # Megatron's constructor takes no class for them but its own


class Adaptation(Protocol):
    """What changes a model before it is built, and what then trains of it."""

    def linear(self, path: str, linear: type) -> type:
        """The class that stands in for a linear's."""
        ...

    def weights(self, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This rank's weights, those that the change adds included."""
        ...

    def prepare(self, chunks: Sequence[nn.Module]) -> None:
        """Called once all weights are set, before anything that trains them is made. Collective."""
        ...


def adapt_layer(layer: TransformerLayerSubmodules, path: str, adapt: Adapt) -> TransformerLayerSubmodules:
    """The layer at `path` with every linear's class as `adapt` gives it."""
    attention, at = layer.self_attention, f"{path}.self_attention"
    down = {name: functools.partial(adapt, f"{at}.{name}") for name in DOWN if hasattr(attention.submodules, name)}
    parts = _adapted(attention.submodules, at, adapt, without=DOWN)
    attention = replace(attention, submodules=parts, params={**attention.params, **({"adapt": down} if down else {})})
    return replace(layer, self_attention=attention, mlp=_adapted_mlp(layer.mlp, f"{path}.mlp", adapt))


def _adapted_mlp(builder: functools.partial, path: str, adapt: Adapt) -> functools.partial:
    parts = builder.keywords["submodules"]
    inner = {
        name: _adapted_mlp(getattr(parts, name), f"{path}.{name}", adapt)
        for name in ("experts", "shared_experts")
        if getattr(parts, name, None) is not None
    }
    parts = replace(parts, **inner) if inner else _adapted(parts, path, adapt)
    return functools.partial(builder.func, *builder.args, **{**builder.keywords, "submodules": parts})


def _adapted(parts: Any, path: str, adapt: Adapt, without: Sequence[str] = ()) -> Any:
    names = (field.name for field in fields(parts) if field.name.startswith("linear_") and field.name not in without)
    given = {name: adapt(f"{path}.{name}", getattr(parts, name)) for name in names if getattr(parts, name) is not None}
    return replace(parts, **given)
