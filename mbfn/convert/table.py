"""A model's rules, expanded: every global Megatron tensor, as copies from Hugging Face ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from mbfn.config.model import ModelConfig, padded_vocab_size
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.copies import Copy, Shape, TensorPlan, coalesce
from mbfn.families import family_of
from mbfn.families.decoder import axis_sizes
from mbfn.families.layout import Sizes, locate, shape_of
from mbfn.families.rule import HfTensor, Rule

Impl = Literal["local", "te"]
Law = Literal["iso", "section"]


def table_of(model: ModelConfig, parallel: ParallelConfig) -> Table:
    """The weight rules of `model`, sized for `parallel`, which only sets how far the vocabulary is padded."""
    return table_padded(model, padded_vocab_size(model, parallel))


@lru_cache(maxsize=16)
def table_padded(model: ModelConfig, padded_vocab: int) -> Table:
    """The weight rules of `model` with embeddings of `padded_vocab` rows on Megatron's side."""
    return Table(model, family_of(model).rules(model), axis_sizes(model, padded_vocab))


def law(rule: Rule, sizes: Sizes) -> Law:
    """`iso`: a bijection. `section`: more places than weights (padding, ties); HF -> Megatron -> HF is exact."""
    weights = sum(_copy(rule, tensor, sizes).numel for tensor in rule.hf)
    return "iso" if math.prod(shape_of(rule.layout, sizes)) == weights and not rule.tied else "section"


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """A rule for one layer: a whole Megatron tensor of the model, before any cut."""

    rule: Rule
    layer: int | None
    shape: Shape
    plan: TensorPlan  # its weights in terms of Hugging Face tensors

    @property
    def name(self) -> str:
        """Megatron's local-spec name with the global layer number."""
        return self.plan.name


class Table:
    """The rules of one model, expanded over its layers: the index map between the two worlds."""

    def __init__(self, model: ModelConfig, rules: tuple[Rule, ...], sizes: Sizes) -> None:
        self.model, self.rules, self.sizes = model, rules, sizes

    @cached_property
    def tensors(self) -> Mapping[str, GlobalTensor]:
        """Every global Megatron tensor by name."""
        return {tensor.name: tensor for rule in self.rules for tensor in self._expand(rule)}

    @cached_property
    def hf_shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every Hugging Face tensor of the model."""
        return {name: shape for rule in self.rules for name, shape in self._hf_shapes(rule)}

    @cached_property
    def uses(self) -> Mapping[str, tuple[tuple[GlobalTensor, Copy], ...]]:
        """For each Hugging Face tensor, the global Megatron tensors that hold its weights (ties left out)."""
        found: dict[str, list[tuple[GlobalTensor, Copy]]] = {name: [] for name in self.hf_shapes}
        for tensor in self.tensors.values():
            for copy in () if tensor.rule.tied else tensor.plan.copies:
                found[copy.source].append((tensor, copy))
        return {name: tuple(uses) for name, uses in found.items()}

    def _expand(self, rule: Rule) -> Iterator[GlobalTensor]:
        shape = shape_of(rule.layout, self.sizes)
        copies = [_copy(rule, tensor, self.sizes) for tensor in rule.hf]
        for layer in self._layers(rule):
            named = tuple(
                Copy(c.source.format(i=layer), c.shape, c.src_offset, c.src_strides, c.dst_offset, c.dst_strides)
                for c in copies
            )
            plan = TensorPlan(rule.mc.format(i=layer), shape, named, named[0].source)
            yield GlobalTensor(rule=rule, layer=layer, shape=shape, plan=plan)

    def _hf_shapes(self, rule: Rule) -> Iterator[tuple[str, Shape]]:
        for tensor in rule.hf:
            shape = shape_of(tensor.layout, self.sizes)
            for layer in self._layers(rule):
                yield tensor.name.format(i=layer), shape

    def _layers(self, rule: Rule) -> tuple[int | None, ...]:
        return tuple(range(self.model.num_layers)) if rule.stage == "layer" else (None,)


def _copy(rule: Rule, tensor: HfTensor, sizes: Sizes) -> Copy:
    """The weights that `tensor` and the rule's Megatron tensor share, their names still templates."""
    here, there = locate(tensor.layout, tensor.label, sizes), locate(rule.layout, tensor.label, sizes)
    if here.strides.keys() != there.strides.keys():
        raise ValueError(f"rule {rule.mc}: {tensor.name} has axes {list(here.strides)}, expected {list(there.strides)}")
    axes = sorted(there.strides, key=lambda axis: (-there.strides[axis], -sizes[axis]))
    copy = Copy(
        tensor.name,
        tuple(sizes[axis] for axis in axes),
        here.offset,
        tuple(here.strides[axis] for axis in axes),
        there.offset,
        tuple(there.strides[axis] for axis in axes),
    )
    return coalesce(copy)
