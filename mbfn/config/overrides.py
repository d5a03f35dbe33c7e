"""Command-line overrides, checked against groups and fields before Hydra sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args

from mbfn.config.build import Problems, dataclass_arms, field_hints, join, value_problems
from mbfn.config.groups import ENV, Catalog
from mbfn.config.names import hint
from mbfn.errors import ConfigError

FROM_HF = "from_hf"  # the option `model=from_hf`: the config of the directory that `init.hf` names


def checked(overrides: Sequence[str], catalog: Catalog) -> tuple[str, ...]:
    """The overrides as Hydra takes them.

    Raises: ConfigError with every unknown group, option and field, ill-typed value, and unreadable override.
    """
    problems: Problems = []
    parsed = [override for text in overrides if (override := _parse(text, problems)) is not None]
    for override in parsed:
        problems.extend(_problems(override, catalog))
    if problems:
        raise ConfigError(problems)
    return tuple(_spelled(override, catalog) for override in parsed)


def parse(text: str) -> Any:
    """Hydra's reading of one override. Raises: hydra.errors.HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def combinations(overrides: Sequence[str], catalog: Catalog) -> list[list[str]]:
    """The overrides of every job of a multirun; a sweep that cannot be listed (an interval) is left out."""
    lists: list[list[str]] = []
    for text in overrides:
        override = parse(text)
        if not override.is_sweep_override():
            lists.append([text])
        elif values := _sweep(override, catalog):
            lists.append([f"{override.get_key_element()}={value}" for value in values])
    return [list(job) for job in itertools.product(*lists)]


def key_of(text: str) -> str:
    """The group or dotted path that an override changes."""
    return text.partition("=")[0].lstrip("+~")


def leaves(cls: type, path: str = "") -> Iterator[str]:
    """The dotted path of every field that holds a value."""
    for name, annotation in field_hints(cls).items():
        classes = dataclass_arms(annotation)
        for arm in classes:
            yield from leaves(arm, join(path, name))
        if not classes:
            yield join(path, name)


def _parse(text: str, problems: Problems) -> Any:
    from hydra.errors import HydraException

    try:
        return parse(text)
    except HydraException:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append((text, "expected KEY=VALUE or GROUP=OPTION (--help lists both)"))
        else:
            quoted = f"'{key}=\"{value}\"'"
            problems.append((key, f"cannot read the value {value!r}; quote = , : and spaces twice: {quoted}"))
        return None


def _problems(override: Any, catalog: Catalog) -> Problems:
    key = override.key_or_group
    if key == "hydra.searchpath":
        return [(key, f"name your directories with --config-dir or {ENV}")]
    if override.is_hydra_override() or override.package is not None:
        return []
    if key in catalog.options or key in catalog.defaults:
        return list(_option_problems(override, catalog))
    if "/" in key:
        return [(key, f"no such group; {hint(key, catalog.options)}")]
    return _field_problems(override, catalog)


def _option_problems(override: Any, catalog: Catalog) -> Iterator[tuple[str, str]]:
    key = override.key_or_group
    if key not in catalog.defaults and not override.is_add():
        yield key, f"this command takes no {key}; its groups are {', '.join(catalog.defaults) or 'none'}"
        return
    for value in _values(override):
        known = {*catalog.options.get(key, ()), *((FROM_HF,) if key == "model" else ())}
        if value is not None and str(value) not in known:
            yield key, f"no option {value!r}; {hint(str(value), known)}"


def _field_problems(override: Any, catalog: Catalog) -> Problems:
    key = override.key_or_group
    try:
        annotations = _walk(key, catalog)
    except ConfigError as error:
        return error.problems
    if override.is_delete() or dataclass_arms(annotations[-1]):
        return []
    plain = (value for value in _values(override) if not (isinstance(value, str) and "${" in value))
    return [problem for value in plain for problem in value_problems(annotations[-1], value, key)]


def _walk(key: str, catalog: Catalog) -> list[Any]:
    """The annotations along a dotted path."""
    classes: tuple[type, ...] = (catalog.root,)
    annotations: list[Any] = []
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent, path = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        fields = _fields(classes)
        if part not in fields:
            raise ConfigError([(path, f"no such field; {_field_hint(part, parent, fields, catalog)}")])
        annotations.append(fields[part])
        classes = dataclass_arms(fields[part])
    return annotations


def _fields(classes: tuple[type, ...]) -> dict[str, Any]:
    """The fields of a section; where it may be one of several dataclasses, what any of them takes."""
    found: dict[str, Any] = {}
    for cls in classes:
        for name, annotation in field_hints(cls).items():
            found[name] = Union[found[name], annotation] if name in found else annotation  # noqa: UP007
    return found


def _field_hint(part: str, parent: str, fields: dict[str, Any], catalog: Catalog) -> str:
    if parent and not fields:
        return f"{parent} is a value, not a section"
    elsewhere = [path for path in leaves(catalog.root) if path.rpartition(".")[2] == part]
    near = {join(parent, name) for name in fields} | (set() if parent else set(catalog.defaults))
    return f"did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else hint(join(parent, part), near)


def _values(override: Any) -> list[Any]:
    """The value, or every value of a sweep that lists them."""
    from hydra.core.override_parser.types import Glob, QuotedString

    if not override.is_sweep_override():
        return [] if override.is_delete() else [override.value()]
    if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
        return []
    return [value.text if isinstance(value, QuotedString) else value for value in override.sweep_iterator()]


def _sweep(override: Any, catalog: Catalog) -> list[str]:
    from hydra.core.override_parser.types import Glob

    if isinstance(override.value(), Glob):
        return list(override.value().filter(list(catalog.options.get(override.key_or_group, {}))))
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []


def _spelled(override: Any, catalog: Catalog) -> str:
    """The override as Hydra wants it said: `+` only on groups without a default, `++` where an arm brings its keys."""
    text, key = str(override.input_line), override.key_or_group
    if override.is_add() and key in catalog.defaults and override.package is None:
        return text.removeprefix("+")
    plain = not (override.is_add() or override.is_force_add() or override.is_delete())
    if plain and not override.is_hydra_override() and override.package is None and key not in catalog.options:
        inside = _walk(key, catalog)[:-1]
        if any(_opens(annotation) for annotation in inside):
            return f"++{text}"
    return text


def _opens(annotation: Any) -> bool:
    return len(dataclass_arms(annotation)) > 1 or type(None) in get_args(annotation)
