"""Plain trees of a composed configuration -> frozen values, with every error of the tree in one exception."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mbfn.config.names import hint
from mbfn.errors import ConfigError

MISSING = "???"  # OmegaConf's mark of a value that must be given
Problems = list[tuple[str, str]]

_BAD: Any = object()  # stands for a value that has been reported
_ARTICLES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def build[T](cls: type[T], tree: Mapping[str, object]) -> T:
    """The frozen `cls` that `tree` describes: lists become tuples, integers floats where a float is due.

    A union of dataclasses is told apart by the `kind` key; an empty mapping stands for the field's default.

    Raises: ConfigError with the full path of every unknown, missing, ill-typed and inconsistent field.
    """
    problems: Problems = []
    value: T = _dataclass(cls, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    return value


def value_problems(hint_: object, value: object, path: str) -> Problems:
    """Why `value` cannot stand in a field annotated `hint_`; empty when it can."""
    problems: Problems = []
    _value(hint_, value, path, problems)
    return problems


@cache
def field_hints(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation of a dataclass."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def arms(annotation: object) -> tuple[Any, ...]:
    """The members of a union without None; of anything else, itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for arm in get_args(annotation) if arm is not type(None))
    return (annotation,)


def dataclass_arms(annotation: object) -> tuple[type, ...]:
    """The dataclasses that a value of this annotation may be."""
    return tuple(arm for arm in arms(annotation) if dataclasses.is_dataclass(arm) and isinstance(arm, type))


def join(path: str, name: str) -> str:
    """The dotted path of `name` under `path`."""
    return f"{path}.{name}" if path else name


def _dataclass(cls: Any, tree: object, path: str, problems: Problems) -> Any:
    if isinstance(tree, cls):
        return tree
    if not isinstance(tree, Mapping):
        return _report(problems, path, f"expected the fields of {cls.__name__}, got {tree!r}")
    hints, before = field_hints(cls), len(problems)
    for name in map(str, tree):
        if name not in hints:
            near = hint(join(path, name), (join(path, known) for known in hints))
            problems.append((join(path, name), f"no such field; {near}"))
    given = {}
    for field in dataclasses.fields(cls):
        if field.init and not _takes_default(field, hints[field.name], tree):
            value = tree.get(field.name, MISSING)
            given[field.name] = _value(hints[field.name], value, join(path, field.name), problems)
    if len(problems) > before:
        return _BAD
    try:
        return cls(**given)
    except ConfigError as error:
        problems.extend((join(path, where) if where else path, text) for where, text in error.problems)
        return _BAD


def _takes_default(field: dataclasses.Field[Any], annotation: object, tree: Mapping[str, object]) -> bool:
    has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    empty_union = len(dataclass_arms(annotation)) > 1 and tree.get(field.name) == {}
    return has_default and (field.name not in tree or empty_union)


def _value(annotation: object, value: object, path: str, problems: Problems) -> Any:
    if isinstance(value, str) and value == MISSING:
        return _report(problems, path, f"is required and has no value; give {path}=...")
    if value is None:
        return None if type(None) in get_args(annotation) else _report(problems, path, _expected(annotation, value))
    members = arms(annotation)
    if len(members) > 1:
        return _union(annotation, value, path, problems)
    (member,) = members
    if dataclass_arms(member):
        return _dataclass(member, value, path, problems)
    if get_origin(member) is Literal:
        return _literal(get_args(member), value, path, problems)
    if get_origin(member) is tuple:
        return _tuple(get_args(member), value, path, problems)
    return _scalar(member, value, path, problems)


def _union(annotation: object, value: object, path: str, problems: Problems) -> Any:
    classes = dataclass_arms(annotation)
    if not classes or not isinstance(value, Mapping):
        for member in sorted(arms(annotation), key=lambda member: member is not type(value)):
            if not value_problems(member, value, path):
                return _value(member, value, path, problems)
        if str in arms(annotation) and not {int, float} & {*arms(annotation)} and isinstance(value, int | float):
            return _scalar(str, value, path, problems)
        return _report(problems, path, _expected(annotation, value))
    kinds = {kind: cls for cls in classes for kind in get_args(field_hints(cls)["kind"])}
    kind = value.get("kind")
    if kind not in kinds:
        names = ", ".join(map(str, kinds))
        return _report(problems, join(path, "kind"), f"expected one of {names}, got {kind!r}; {hint(str(kind), kinds)}")
    return _dataclass(kinds[kind], value, path, problems)


def _literal(choices: tuple[Any, ...], value: object, path: str, problems: Problems) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    close = hint(str(value), map(str, choices))
    advice = f"; {close}" if close.startswith("did") else ""
    return _report(problems, path, f"expected one of {', '.join(map(str, choices))}, got {value!r}{advice}")


def _tuple(members: tuple[Any, ...], value: object, path: str, problems: Problems) -> Any:
    if not isinstance(value, list | tuple):
        return _report(problems, path, f"expected a list, got {value!r}; write {path}=[{value}]")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        return _report(problems, path, f"expected {len(members)} values, got {len(value)}: {list(value)}")
    items = enumerate(zip(members, value, strict=True))
    return tuple(_value(member, item, f"{path}[{i}]", problems) for i, (member, item) in items)


def _scalar(member: Any, value: object, path: str, problems: Problems) -> Any:
    if member not in _ARTICLES:
        raise TypeError(f"{path}: build() has no rule for the annotation {member!r}")
    if type(value) is member:
        return value
    if member is float and type(value) is int:
        return float(value)
    advice = ""
    if member is str and isinstance(value, int | float):
        advice = f"; quote it: '{path}=\"{value}\"'"
    elif member is int and isinstance(value, float) and value.is_integer():
        advice = f"; write {path}={int(value)}"
    return _report(problems, path, f"expected {_ARTICLES[member]}, got {value!r}{advice}")


def _expected(annotation: object, value: object) -> str:
    wanted = [_describe(member) for member in arms(annotation)]
    return f"expected {' or '.join(wanted)}, got {'null' if value is None else repr(value)}"


def _describe(member: Any) -> str:
    if get_origin(member) is Literal:
        return f"one of {', '.join(map(str, get_args(member)))}"
    if get_origin(member) is tuple:
        return "a list"
    return _ARTICLES.get(member) or f"the fields of {getattr(member, '__name__', member)}"


def _report(problems: Problems, path: str, text: str) -> Any:
    problems.append((path, text))
    return _BAD
