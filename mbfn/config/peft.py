"""Which weights train: the `peft` group."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require

AdapterDtype = Literal["weights", "fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A low-rank update beside one linear: `y = W x + scale * B A x`, W frozen."""

    rank: int
    alpha: float
    dropout: float = 0.0  # on the input of A, in training
    dtype: AdapterDtype = "weights"
    use_rslora: bool = False  # scale is alpha / sqrt(rank), not alpha / rank
    use_dora: bool = False  # rows of W + scale * B A get a length that is learnt (DoRA)
    parts: tuple[str, ...] = ()  # each of these outputs has an A of its own, others none; empty: one A for all

    def __post_init__(self) -> None:
        if problems := _size_problems(self.rank, self.alpha, self.dropout):
            raise ConfigError(problems)

    @property
    def scale(self) -> float:
        """The factor of `B A`."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOverride:
    """Other settings for the modules that `target` matches; null leaves one as it is."""

    target: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    dtype: AdapterDtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """`none` trains every weight; the others train adapters beside frozen weights.

    A target is a module's path or its end, with wildcards: `linear_qkv`, `layers.0.*`, `experts.linear_fc?`. With
    `canonical` it may end in a part: `linear_qkv.q`, `linear_fc1.gate`.
    """

    kind: Literal["none", "lora", "dora"] = "none"
    targets: tuple[str, ...] = ("linear_*",)
    exclude: tuple[str, ...] = ()  # modules that stay without, though a target matches
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    dtype: AdapterDtype = "weights"  # of A and B; weights: as the frozen weights are held
    use_rslora: bool = False  # scale is alpha / sqrt(rank), not alpha / rank
    canonical: bool = False  # adapters of their own for q, k and v, gate and up, as PEFT trains them
    overrides: tuple[AdapterOverride, ...] = ()  # for some targets; the last one that matches counts
    method: str | None = None  # module:function that decides instead of targets: (path, Linear) -> AdapterSpec or None

    def __post_init__(self) -> None:
        problems = _size_problems(self.rank, self.alpha, self.dropout)
        if self.kind == "none":
            problems += _unused_problems(self)
        require(bool(self.targets), "targets", "expected patterns, such as [linear_qkv, linear_proj]", problems)
        text = "DoRA would take a second pass through every weight; set peft.dropout=0, or peft=lora"
        dropped = self.dropout or any(override.dropout for override in self.overrides)
        require(self.kind != "dora" or not dropped, "dropout", text, problems)
        named = self.method is None or self.method.count(":") == 1
        require(named, "method", f"expected module:function, got {self.method!r}", problems)
        if problems:
            raise ConfigError(problems)


def _size_problems(rank: int, alpha: float, dropout: float) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    require(rank >= 1, "rank", f"expected at least 1, got {rank}", problems)
    require(alpha > 0, "alpha", f"expected more than 0, got {alpha}", problems)
    require(0 <= dropout < 1, "dropout", f"expected in [0, 1), got {dropout}", problems)
    return problems


def _unused_problems(peft: PeftConfig) -> list[tuple[str, str]]:
    given = [f.name for f in dataclasses.fields(peft) if f.name != "kind" and getattr(peft, f.name) != f.default]
    return [(name, "there are no adapters; choose peft=lora, lora_canonical, rslora or dora") for name in given]
