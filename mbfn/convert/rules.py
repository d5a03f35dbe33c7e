"""Weight rules: one global Megatron tensor, and the Hugging Face tensors that hold the same weights.

A rule is data. Names have the placeholders `{i}` (global layer) and `{e}` (expert); layouts name their axes. Everything
that a conversion does (import, export, resharding, reading one rank's bytes, checking names and shapes) is derived from
the same table, so there is no second one to disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mbfn.config.model import ModelConfig
from mbfn.convert.copies import Copy, Shape, TensorPlan, coalesce
from mbfn.convert.layout import Cat, Layout, Sizes, dim_size, locate, shape_of

Impl = Literal["local", "te"]
Stage = Literal["layer", "first", "last"]
Law = Literal["iso", "section"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTensor:
    """One Hugging Face tensor of a rule: the weights `label`, or all of them where it is empty."""

    name: str
    layout: Layout
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A global Megatron tensor (of every layer, where its name has `{i}`) and what it is made of."""

    mc: str  # Megatron's local-spec name; also the rule's identity
    layout: Layout
    hf: tuple[HfTensor, ...]
    te: str = ""  # Transformer Engine's name, where it differs
    cut: int | None = None  # dimension that tensor parallelism cuts; none: every rank holds the whole
    stage: Stage = "layer"
    tied: bool = False  # a second copy of another rule's weights; export leaves it out

    def law(self, sizes: Sizes) -> Law:
        """`iso`: a bijection. `section`: more places than weights (padding, ties); HF -> Megatron -> HF is exact."""
        weights = sum(_numel(tensor, self, sizes) for tensor in self.hf)
        places = 1
        for size in shape_of(self.layout, sizes):
            places *= size
        return "iso" if places == weights and not self.tied else "section"

    def sections(self, sizes: Sizes) -> Shape:
        """Lengths along `cut` that are divided over ranks one by one: the blocks of a top-level `Cat`, else all."""
        if self.cut is None:
            return ()
        dim = self.layout[self.cut]
        blocks = [block for _, block in dim.blocks] if isinstance(dim, Cat) else [dim]
        return tuple(dim_size(block, sizes) for block in blocks)


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
            plan = TensorPlan(rule.mc.format(i=layer), shape, named)
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


def _numel(tensor: HfTensor, rule: Rule, sizes: Sizes) -> int:
    return _copy(rule, tensor, sizes).numel
