"""Experts that are all on this rank, from tokens to tokens without a word from the device to the host.

Megatron's dispatcher sorts chunks of tokens that no rank sent, and waits until the host knows how many each expert has;
Transformer Engine then splits tensors and starts products by those numbers. Here the numbers stay on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from mbfn.megatron.grouped_kernel import Groups, Table, add_gradient, grouped, product, table_of


def own_experts(builder: functools.partial) -> functools.partial | None:
    """Megatron's builder of all experts of a rank with the products of this module; None for adapted or other ones."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear

    parts = builder.keywords.get("submodules")
    linears = (getattr(parts, "linear_fc1", None), getattr(parts, "linear_fc2", None))
    if builder.func is not TEGroupedMLP or linears != (TEColumnParallelGroupedLinear, TERowParallelGroupedLinear):
        return None
    return built_of(builder, TEColumnParallelGroupedLinear, TERowParallelGroupedLinear)


def built_of(builder: functools.partial, first: type, second: type) -> functools.partial:
    """The builder with experts that hold their weights in these classes of linears."""
    parts = replace(
        builder.keywords["submodules"], linear_fc1=with_own_product(first), linear_fc2=with_own_product(second)
    )
    return functools.partial(OwnExperts, **{**builder.keywords, "submodules": parts})


class LocalTokens(MoEAlltoAllTokenDispatcher):
    """The dispatcher of one rank: tokens are sorted once, and how many each expert has stays on the device."""

    tokens_per_expert: Tensor | None

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        return tokens_per_expert

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Nothing came from elsewhere. Shapes: (T, H), (T,) -> (T, H), (E,), (T,)."""
        counts, self.tokens_per_expert = self.tokens_per_expert, None
        return tokens, counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Shapes: (T, H) -> (T, H)."""
        return hidden_states


class OwnExperts(TEGroupedMLP):
    """Megatron's experts, whose linears take the map of rows in place of numbers on the host."""

    own_products = True

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        output_buffer: Tensor | None = None,
        grad_input_buffer: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes: (T, H), (E,), (T,) -> (T, H)."""
        if not (self.linear_fc1.ready() and self.linear_fc2.ready()):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        groups = grouped(tokens_per_expert, permuted_local_hidden_states.size(0))
        hidden, _ = self.linear_fc1(permuted_local_hidden_states, groups)
        probs = permuted_probs.unsqueeze(-1)
        if not self.activation_recompute:
            return self.linear_fc2(self._activated(hidden, probs), groups)
        checkpoint = tensor_parallel.CheckpointWithoutOutput()
        out, _ = self.linear_fc2(checkpoint.checkpoint(self._activated, hidden, probs), groups)
        checkpoint.discard_output_and_register_recompute(out)
        return out, None

    def _activated(self, hidden: Tensor, probs: Tensor) -> Tensor:
        """Shapes: (T, 2 * F), (T, 1) -> (T, F)."""
        return weighted_bias_swiglu_impl(hidden, None, probs, self.config.activation_func_fp8_input_store)


@functools.cache
def with_own_product(linear: type) -> type:
    """`linear`, that holds one weight an expert, with the products of this module for a map of rows."""

    class OwnProduct(linear):
        def __init__(self, experts: int, *args: Any, **settings: Any) -> None:
            super().__init__(experts, *args, **settings)
            self.weight_names = tuple(f"weight{expert}" for expert in range(experts))
            self.weight_table: Table | None = None
            self.grad_table: Table | None = None

        def weights(self) -> tuple[nn.Parameter, ...]:
            """One an expert."""
            held = self._parameters
            return tuple([held[name] for name in self.weight_names])

        def ready(self) -> bool:
            """Whether the product's gradients have a buffer of their own to go to, or are not wanted."""
            weights = self.weights()
            wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
            return not wanted or all(_has_buffer(weight) for weight in weights)

        def matrices(self, weights: Sequence[nn.Parameter]) -> Table:
            """Where the weights are now."""
            self.weight_table = table_of(weights, self.weight_table)
            return self.weight_table

        def gradients(self, weights: Sequence[nn.Parameter]) -> Table:
            """Where their gradients are added up."""
            self.grad_table = table_of([_buffer(weight) for weight in weights], self.grad_table)
            return self.grad_table

        def forward(self, x: Tensor, rows: Any) -> tuple[Tensor, Tensor | None]:
            """Shapes: (T, K) -> (T, N)."""
            if not isinstance(rows, Groups):
                return super().forward(x, rows)
            return _Product.apply(x, rows, self, *self.weights()), None

    return OwnProduct


def _buffer(weight: nn.Parameter) -> Tensor:
    return weight.main_grad  # type: ignore[attr-defined]


def _has_buffer(weight: nn.Parameter) -> bool:
    """Megatron's own one: those of its FSDP come and go, and take one micro-batch."""
    return weight.requires_grad and hasattr(weight, "main_grad") and not hasattr(weight, "__fsdp_param__")


class _Product(torch.autograd.Function):
    """Rows times their experts' weights, whose gradients go straight to their buffers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, linear: Any, *weights: nn.Parameter) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        ctx.groups, ctx.linear = groups, linear
        return product(x, linear.matrices(weights), groups, weights[0].size(0), transposed=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dy, linear, dx, (x,) = grads[0].contiguous(), ctx.linear, None, ctx.saved_tensors
        weights = linear.weights()
        if ctx.needs_input_grad[0]:
            dx = product(dy, linear.matrices(weights), ctx.groups, weights[0].size(1), transposed=True)
        if x is None:
            return dx, None, None, *(None for _ in weights)
        add_gradient(dy, x, linear.gradients(weights), ctx.groups)
        return dx, None, None, *_placeholders(weights)


def _placeholders(weights: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """What autograd is given for gradients that are in their buffers already, so that Megatron's hooks run.

    The hooks drop them unread. All are one piece of memory; under a wrapper without such hooks there are none.
    """
    if not hasattr(weights[0], "grad_added_to_main_grad"):
        return [None] * len(weights)
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    rows, cols = weights[0].shape
    return torch.empty_like(weights[0]).as_strided((len(weights), rows, cols), (0, cols, 1)).unbind()
