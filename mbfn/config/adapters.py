"""Which modules of a model get which adapter, and how many weights train then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mbfn.config.linears import Linear, layer_linears, linear_path
from mbfn.config.model import ModelConfig
from mbfn.config.peft import AdapterSpec, PeftConfig
from mbfn.errors import ConfigError, require

if TYPE_CHECKING:
    from mbfn.config.run import RunConfig

_OVERLAP = "parallel.overlap_moe_expert_parallel_comm"
Method = Callable[[str, Linear], AdapterSpec | None]
"""Decides on each linear of a model, by its path and its description."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter of one module."""

    layer: int
    linear: Linear
    spec: AdapterSpec

    @property
    def path(self) -> str:
        """The module's path in the whole model."""
        return linear_path(self.layer, self.linear)

    @property
    def parameters(self) -> int:
        """Weights that train here, those of all experts together."""
        linear, spec = self.linear, self.spec
        rows = sum(size for part, size in linear.parts if part in spec.parts) if spec.parts else linear.out_size
        each = spec.rank * (linear.in_size * max(1, len(spec.parts)) + rows) + spec.use_dora * linear.out_size
        return each * max(1, linear.experts)


@lru_cache(maxsize=64)
def adapters_of(model: ModelConfig, peft: PeftConfig) -> tuple[Adapter, ...]:
    """Every adapter of `model`, in the order of its modules; none where every weight trains.

    Raises: ConfigError for a target that no module matches, naming those there are; for what PEFT has no form of.
    """
    if peft.kind == "none":
        return ()
    linears = {linear_path(i, x): (i, x) for i in range(model.num_layers) for x in layer_linears(model, i)}
    method = _by_targets(peft, linears) if peft.method is None else _imported(peft.method)
    chosen = ((layer, linear, method(path, linear)) for path, (layer, linear) in linears.items())
    found = tuple(Adapter(layer=i, linear=x, spec=spec) for i, x, spec in chosen if spec is not None)
    if problems := [*_peft_problems(found), *_mixture_problems(model, found), *_part_problems(found)]:
        raise ConfigError(problems)
    if not found:
        where = f"{peft.method} gave" if peft.method else "peft.exclude leaves"
        raise ConfigError([("peft.targets", f"{where} no module an adapter; the model has {_names(linears)}")])
    return found


def adapter_problems(run: RunConfig) -> list[tuple[str, str]]:
    """What a run with adapters, or without, cannot do."""
    problems: list[tuple[str, str]] = []
    if run.peft.kind == "none":
        text = "there are no adapters; choose peft=lora, lora_canonical, rslora or dora"
        require(run.init.adapter is None, "init.adapter", text, problems)
        require(not run.checkpoint.export_merged, "checkpoint.export_merged", text, problems)
        return problems
    parallel, train = run.parallel, run.train
    sharded = parallel.sharding in ("none", "zero1")
    require(sharded, "parallel.sharding", "adapters train with none or zero1", problems)
    overlaps = parallel.overlap_moe_expert_parallel_comm or parallel.moe_shared_expert_overlap
    field = "parallel.moe_shared_expert_overlap" if parallel.moe_shared_expert_overlap else _OVERLAP
    require(not overlaps, field, "adapters are no part of the overlapped kernels; set it to false", problems)
    require(not parallel.tp_comm_overlap, "parallel.tp_comm_overlap", "not with adapters; set it to false", problems)
    require(train.cuda_graph_impl == "none", "train.cuda_graph_impl", "not with adapters; set it to none", problems)
    merged = not run.checkpoint.export_merged or run.checkpoint.export_hf
    require(merged, "checkpoint.export_merged", "needs checkpoint.export_hf=true", problems)
    try:
        adapters_of(run.model, run.peft)
    except ConfigError as error:
        problems += error.problems
    return problems


def trainable_parameters(model: ModelConfig, peft: PeftConfig) -> int:
    """Weights that a run updates."""
    if peft.kind == "none":
        return model.num_parameters
    return sum(adapter.parameters for adapter in adapters_of(model, peft))


def _by_targets(peft: PeftConfig, linears: Mapping[str, tuple[int, Linear]]) -> Method:
    _check_patterns(peft, linears)
    plain = AdapterSpec(
        rank=peft.rank,
        alpha=peft.alpha,
        dropout=peft.dropout,
        dtype=peft.dtype,
        use_rslora=peft.use_rslora,
        use_dora=peft.kind == "dora",
    )

    def choose(path: str, linear: Linear) -> AdapterSpec | None:
        names = _parts(path, linear, peft)
        wanted = [n for n in names if _any(n, path, peft.targets) and not _any(n, path, peft.exclude)]
        if not wanted:
            return None
        spec = plain
        for override in peft.overrides:
            if _any(path, path, (override.target,)):
                given = {key: getattr(override, key) for key in ("rank", "alpha", "dropout", "dtype")}
                spec = replace(spec, **{key: value for key, value in given.items() if value is not None})
        parts = tuple(name.removeprefix(f"{path}.") for name in wanted) if peft.canonical and linear.parts else ()
        return replace(spec, parts=parts)

    return choose


def _parts(path: str, linear: Linear, peft: PeftConfig) -> tuple[str, ...]:
    """The names that targets may choose: the module, or each of its parts."""
    return tuple(f"{path}.{part}" for part, _ in linear.parts) if peft.canonical and linear.parts else (path,)


def _any(name: str, path: str, patterns: tuple[str, ...]) -> bool:
    whole = {name, path}
    return any(fnmatchcase(x, p) or fnmatchcase(x, f"*.{p}") for p in patterns for x in whole)


def _check_patterns(peft: PeftConfig, linears: Mapping[str, tuple[int, Linear]]) -> None:
    names = [(name, path) for path, (_, linear) in linears.items() for name in _parts(path, linear, peft)]
    given = [("peft.targets", p) for p in peft.targets] + [("peft.exclude", p) for p in peft.exclude]
    given += [(f"peft.overrides[{i}].target", override.target) for i, override in enumerate(peft.overrides)]
    problems = [
        (field, f"no module matches {p!r}; the model has {_names(linears)}{_part_hint(p, peft)}")
        for field, p in given
        if not any(_any(*pair, (p,)) for pair in names)
    ]
    if problems:
        raise ConfigError(problems)


def _part_hint(pattern: str, peft: PeftConfig) -> str:
    part = pattern.rpartition(".")[2] in ("q", "k", "v", "gate", "up")
    return "; parts have adapters of their own with peft=lora_canonical" if part and not peft.canonical else ""


def _names(linears: Mapping[str, tuple[int, Linear]]) -> str:
    return ", ".join(dict.fromkeys(linear.name for _, linear in linears.values()))


def _peft_problems(found: tuple[Adapter, ...]) -> list[tuple[str, str]]:
    """What PEFT cannot hold or load: its experts are one tensor a layer, its DoRA is for all adapters or none."""
    problems = []
    routed = [adapter for adapter in found if adapter.linear.experts]
    if any(adapter.spec.parts for adapter in routed):
        text = "PEFT has one A for gate and up of experts; set peft.exclude=[experts.*], or choose peft=lora"
        problems.append(("peft.canonical", text))
    if len({adapter.spec.use_dora for adapter in found}) > 1:
        problems.append(("peft.method", "PEFT has DoRA in all adapters or in none; make use_dora equal"))
    return problems


def _mixture_problems(model: ModelConfig, found: tuple[Adapter, ...]) -> list[tuple[str, str]]:
    inside = any(adapter.spec.use_dora and adapter.linear.name.startswith("mlp.") for adapter in found)
    if model.moe is None or not inside:
        return []
    return [("peft.kind", "PEFT has no DoRA of MLPs of a mixture; set peft.exclude=[mlp.*], or choose peft=lora")]


def _part_problems(found: tuple[Adapter, ...]) -> list[tuple[str, str]]:
    """Specs of a user's own method that do not fit their module."""
    problems = []
    for adapter in found:
        known = [part for part, _ in adapter.linear.parts]
        if unknown := [part for part in adapter.spec.parts if part not in known]:
            problems.append(("peft.method", f"{adapter.path}: has parts {known}, the adapter {unknown}"))
        if adapter.spec.use_dora and adapter.spec.dropout:
            problems.append(("peft.method", f"{adapter.path}: DoRA takes no dropout; set it to 0"))
    return problems


def _imported(name: str) -> Method:
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError([("peft.method", f"{name}: cannot be imported: {error}")]) from None
    return found
