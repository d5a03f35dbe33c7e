"""Weight rules: one global Megatron tensor, and the Hugging Face tensors that hold the same weights.

A rule is data. Names have the placeholder `{i}` (global layer); layouts name their axes. Everything that a conversion
does (import, export, resharding, reading one rank's bytes, checking names and shapes) is derived from the same table,
so there is no second one to disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.families.layout import Cat, Layout, Shape, Sizes, dim_size

Stage = Literal["layer", "first", "last"]


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
    tied: str = ""  # the rule that this one's tensor copies; export leaves the copy out

    def sections(self, sizes: Sizes) -> Shape:
        """Lengths along `cut` that are divided over ranks one by one: the blocks of a top-level `Cat`, else all."""
        if self.cut is None:
            return ()
        dim = self.layout[self.cut]
        blocks = [block for _, block in dim.blocks] if isinstance(dim, Cat) else [dim]
        return tuple(dim_size(block, sizes) for block in blocks)
