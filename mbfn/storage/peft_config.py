"""`adapter_config.json`: what PEFT must know to build a run's adapters, and which adapters such a file describes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbfn.config.adapters import Adapter
from mbfn.config.linears import Linear, layer_linears
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.peft import AdapterSpec
from mbfn.convert.states import dtype_of
from mbfn.convert.table import Table, table_of
from mbfn.errors import ConversionError
from mbfn.families.adapters import WEIGHT, peft_name, rule_name
from mbfn.families.rule import EXPERT, Form, HfTensor, Rule

_PLAIN: Mapping[str, Any] = {"bias": "none", "modules_to_save": None, "lora_bias": False, "layer_replication": None}
"""Settings of PEFT with which its LoRA is the one here."""


def peft_config(model: ModelConfig, adapters: Iterable[Adapter], form: Form = "stacked") -> dict[str, Any]:
    """The file for `adapters`; rank and alpha that most have stand for all, others are listed by module."""
    table = table_of(model, ParallelConfig(), form)
    found = [(name, adapter.spec) for adapter in adapters for name in _hf_modules(table, adapter)]
    specs = [spec for _, spec in found]
    rank = Counter(spec.rank for spec in specs).most_common(1)[0][0]
    rslora = all(spec.use_rslora for spec in specs)
    alphas = [_alpha(spec, rslora=rslora) for spec in specs]
    alpha = Counter(alphas).most_common(1)[0][0]
    linears = [name for name, _ in found if not _is_parameter(name)]
    parameters = [name for name, _ in found if _is_parameter(name)]
    known = [name for name, shape in table.hf_shapes.items() if len(shape) > 1]
    return {
        **_PLAIN,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else max(spec.dropout for spec in specs),
        "use_rslora": rslora,
        "use_dora": specs[0].use_dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {name: spec.rank for name, spec in found if spec.rank != rank},
        "alpha_pattern": {name: a for (name, _), a in zip(found, alphas, strict=True) if a != alpha},
        "target_modules": sorted(_shortened(linears, [name.removesuffix(WEIGHT) for name in known])),
        "target_parameters": sorted(_shortened(parameters, known)) or None,
    }


def adapters_in(config: Mapping[str, Any], source: Mapping[str, Tensor], model: ModelConfig) -> tuple[Adapter, ...]:
    """The adapters of `model` that PEFT's file `config` describes and `source` holds, names and ranks from the latter.

    Parts of a module with equal A share one, others stay apart. Raises: ConversionError for what is not LoRA as here,
    for a name that no module of the model has.
    """
    _check_config(config)
    form = adapter_form(source)
    table = table_of(model, ParallelConfig(), form)
    names, found = set[str](), []
    for layer in range(model.num_layers):
        for linear in layer_linears(model, layer):
            held = _held(config, source, table, layer, linear)
            if held is None:
                continue
            found.append(held.adapter)
            names |= held.names
    unknown = [name for name in source if name not in names]
    if unknown:
        raise ConversionError(
            f"{unknown[0]}: no linear of family {model.family} for this adapter ({len(unknown)} such)"
        )
    if not found:
        raise ConversionError("adapter_model.safetensors: expected adapters, found no tensor")
    return tuple(found)


def adapter_form(names: Iterable[str]) -> Form:
    """Whether these tensors of PEFT adapt experts one by one."""
    return "hub" if any(re.search(r"\.experts\.\d+\.", name) for name in names) else "stacked"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    adapter: Adapter
    names: frozenset[str]


def _held(
    config: Mapping[str, Any], source: Mapping[str, Tensor], table: Table, layer: int, linear: Linear
) -> _Held | None:
    """The adapter of one module, where the tensors have one."""
    rule, inner = _rule(table, linear), _adapts(config, layer, "down_proj")
    parts: dict[str, list[str]] = {}
    for tensor in rule.hf:
        if not tensor.name.endswith(WEIGHT) and not _adapts(config, layer, tensor.name.rpartition(".")[2]):
            continue
        at = [
            peft_name(tensor, "lora_A.weight", inner=inner).format(i=layer, e=e)
            for e in range(linear.experts if "{e}" in tensor.name else 1)
        ]
        if at[0] in source:
            parts[tensor.label] = at
    if not parts:
        return None
    spec = _spec(config, source, rule, layer, linear, parts)
    names = {name.replace("lora_A", kind) for at in parts.values() for name in at for kind in ("lora_A", "lora_B")}
    if spec.use_dora:
        names |= {at[0].replace("lora_A.weight", "lora_magnitude_vector") for at in parts.values()}
    return _Held(adapter=Adapter(layer=layer, linear=linear, spec=spec), names=frozenset(names))


def _spec(
    config: Mapping[str, Any],
    source: Mapping[str, Tensor],
    rule: Rule,
    layer: int,
    linear: Linear,
    parts: Mapping[str, list[str]],
) -> AdapterSpec:
    tensors = {tensor.label: tensor for tensor in rule.hf}
    stacked = EXPERT in rule.hf[0].layout
    sizes = {label: source[at[0]].shape[0] // (linear.experts if stacked else 1) for label, at in parts.items()}
    alphas = {label: _pattern(config["alpha_pattern"], tensors[label], layer, config["lora_alpha"]) for label in parts}
    at = next(iter(parts.values()))[0]
    if len({*sizes.values()}) > 1 or len({*alphas.values()}) > 1:
        raise ConversionError(
            f"{at}: parts of one module differ in rank or alpha: {sizes}, {alphas}; expected the same"
        )
    shared = stacked or (len(parts) == len(rule.hf) and _equal(source, list(parts.values())))
    return AdapterSpec(
        rank=next(iter(sizes.values())),
        alpha=float(next(iter(alphas.values()))),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        parts=() if shared else tuple(parts),
        dtype="fp32" if dtype_of(source, at) == torch.float32 else "weights",
    )


def _equal(source: Mapping[str, Tensor], parts: list[list[str]]) -> bool:
    return all(torch.equal(source[a], source[b]) for other in parts[1:] for a, b in zip(parts[0], other, strict=True))


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConversionError(f"adapter_config.json: peft_type: expected LORA, found {config.get('peft_type')!r}")
    for key, value in _PLAIN.items():
        if config.get(key, value) not in (value, [], {}, False):
            raise ConversionError(f"adapter_config.json: {key}: expected {value!r}, found {config[key]!r}")
    for key in ("use_qalora", "use_bdlora", "velora_config", "kasa_config", "monteclora_config", "arrow_config"):
        if config.get(key):
            raise ConversionError(f"adapter_config.json: {key}: expected none, found {config[key]!r}")


def _adapts(config: Mapping[str, Any], layer: int, parameter: str) -> bool:
    """Whether the stacked experts' `parameter` of a layer has an adapter."""
    whole = f"model.layers.{layer}.mlp.experts.{parameter}"
    wanted = config.get("target_parameters") or ()
    return any(whole == target or whole.endswith(f".{target}") for target in wanted)


def _pattern(patterns: Mapping[str, Any] | None, tensor: HfTensor, layer: int, default: Any) -> Any:
    name = tensor.name.format(i=layer, e=0)
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", tried) for tried in (name, name.removesuffix(WEIGHT))):
            return value
    return default


def _alpha(spec: AdapterSpec, *, rslora: bool) -> float | int:
    """PEFT's alpha that gives the adapter's scale; an integer where it is one."""
    alpha = spec.alpha if spec.use_rslora == rslora else spec.scale * spec.rank
    return int(alpha) if alpha == int(alpha) else alpha


def _rule(table: Table, linear: Linear) -> Rule:
    return next(rule for rule in table.rules if rule.mc == rule_name(linear.name) + WEIGHT)


def _hf_modules(table: Table, adapter: Adapter) -> Iterator[str]:
    """The linears, or parameters, that PEFT adapts for one adapter, each once.

    Of a mixture with stacked experts PEFT (0.21) takes every linear by the name of a projection of an MLP for an
    expert's of transformers 4, so that those of dense MLPs and shared experts are listed as parameters.
    """
    tensors = [t for t in _rule(table, adapter.linear).hf if not adapter.spec.parts or t.label in adapter.spec.parts]
    stacked = any(EXPERT in t.layout for rule in table.rules for t in rule.hf)
    for name in dict.fromkeys(tensor.name for tensor in tensors):
        for expert in range(adapter.linear.experts) if "{e}" in name else (0,):
            numbered = name.format(i=adapter.layer, e=expert)
            yield numbered if stacked and adapter.linear.name.startswith("mlp.") else numbered.removesuffix(WEIGHT)


def _is_parameter(name: str) -> bool:
    return name.endswith((WEIGHT, ".experts.gate_up_proj", ".experts.down_proj"))


def _shortened(names: list[str], known: list[str]) -> set[str]:
    """The last words of names, where these choose among `known` no others; else as many more as it takes."""
    chosen, short = set(names), set[str]()
    for name in names:
        words = name.split(".")
        tails = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        short.add(next(t for t in tails if all(k in chosen for k in known if k == t or k.endswith(f".{t}"))))
    return short
