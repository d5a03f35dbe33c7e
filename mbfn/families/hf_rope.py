"""Rotary positions in `config.json`, in the form of transformers 4 or 5, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mbfn.config.model import ModelConfig, RopeScaling
from mbfn.errors import ConversionError

KINDS: Mapping[str, tuple[str, ...]] = {  # rope_type: the keys that it is made of
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
OPTIONAL = frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
OUTSIDE = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})


def read_rope(known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `rotary_base`, `rotary_percent` and `rope_scaling` of a ModelConfig."""
    rope: Mapping[str, Any] = known.get("rope_parameters") or known.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor", known.get("partial_rotary_factor", 1.0))
    return {
        "rotary_base": float(rope.get("rope_theta", known.get("rope_theta", 10000.0))),
        "rotary_percent": float(share),
        "rope_scaling": read_scaling(rope),
    }


def read_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    """One entry of `rope_parameters`, or `rope_scaling`.

    Raises: ConversionError for a kind or key that is not supported, or one that is missing.
    """
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        raise ConversionError(f"config.json: rope_type: expected {', '.join(KINDS)}, found {kind!r}")
    keys = KINDS[kind]
    unknown = sorted(rope.keys() - set(keys) - OUTSIDE)
    if unknown and kind != "default":
        raise ConversionError(f"config.json: rope_scaling: {unknown[0]}: unknown key for rope_type {kind!r}")
    missing = [key for key in keys if rope.get(key) is None and key not in OPTIONAL]
    if missing:
        raise ConversionError(f"config.json: rope_scaling: {missing[0]}: missing, rope_type {kind!r} needs it")
    types = {field.name: type(getattr(RopeScaling(), field.name)) for field in fields(RopeScaling)}
    given = {key: types[key](rope[key]) for key in keys if rope.get(key) is not None}
    return RopeScaling(rope_type=kind, **given)


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys that `read_rope` reads."""
    scaling = model.rope_scaling
    written: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_scaling": None}
    if model.rotary_percent != 1.0:
        written["partial_rotary_factor"] = model.rotary_percent
    if scaling.rope_type != "default":
        values = {key: getattr(scaling, key) for key in KINDS[scaling.rope_type]}
        set_keys = {k: v for k, v in values.items() if k not in OPTIONAL or v != getattr(RopeScaling(), k)}
        written["rope_scaling"] = {"rope_type": scaling.rope_type, **set_keys}
    return written
