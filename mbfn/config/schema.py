"""Frozen values as plain, mutable trees: what Hydra composes over, what YAML holds, what `build` takes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mbfn.config.build import MISSING, dataclass_arms, field_hints


def schema(cls: type) -> dict[str, Any]:
    """The mutable twin of the frozen dataclass `cls`, for Hydra's ConfigStore: every field with its default.

    A required field holds `???`; a union of dataclasses is empty until a group option fills it. The leaves are left
    untyped: OmegaConf would stop at the first ill-typed one, `build` names them all. Nodes of the frozen class itself
    would be read-only, so that nothing could be merged into them.
    """
    return {field.name: _default(cls, field) for field in dataclasses.fields(cls) if field.init}


def defaults_of(config: Any) -> dict[str, Any]:
    """`schema(type(config))` where a union of dataclasses holds the schema of the member that `config` has."""
    found = schema(type(config))
    values = {name: getattr(config, name) for name, default in found.items() if default == {}}
    return found | {name: schema(type(value)) for name, value in values.items() if dataclasses.is_dataclass(value)}


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a frozen config as nested dicts, lists and scalars; `build(type(config), ...)` is its inverse."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def to_yaml(config: Any) -> str:
    """`to_dict(config)` as YAML that any reader understands, in the order of the fields."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def _default(cls: type, field: dataclasses.Field[Any]) -> Any:
    classes = dataclass_arms(field_hints(cls)[field.name])
    if len(classes) > 1:
        return {}
    if field.default is not dataclasses.MISSING:
        return _plain(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    return schema(classes[0]) if classes else MISSING


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
