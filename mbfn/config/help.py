"""The text of `--help`: what a command is, its groups with every option, its own fields."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import get_args

from mbfn.config.build import MISSING, dataclass_arms, field_hints, join
from mbfn.config.groups import Catalog, header
from mbfn.config.schema import schema

_FLAGS = """\
Flags
  --cfg job          print the composed configuration instead of running
  -m, --multirun     one job for every combination of comma-separated values: train.seed=1,2 parallel=tp2,pp2
  --config-dir DIR   add your own groups and options (also MBFN_CONF=DIR)
  --info defaults    how the configuration was composed
"""


def help_text(catalog: Catalog) -> str:
    """The header of the primary file, the groups with one line an option, the fields that no group fills."""
    parts = ["\n".join(header(catalog.primary))]
    groups = [group for group in catalog.defaults if catalog.options.get(group)]
    if groups:
        parts.append("Groups: one option each, GROUP=OPTION; single fields, GROUP.FIELD=VALUE\n" + _groups(catalog))
    fields = list(_fields(catalog.root, skip=set(groups)))
    if fields:
        width = max(len(name) for name, _ in fields)
        parts.append(
            "Fields: FIELD=VALUE\n" + "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in fields)
        )
    return "\n\n".join([*parts, _FLAGS])


def _groups(catalog: Catalog) -> str:
    return "\n".join(line for group in catalog.defaults if group in catalog.options for line in _group(catalog, group))


def _group(catalog: Catalog, group: str) -> Iterator[str]:
    options = catalog.options[group]
    width = max(map(len, options))
    yield f"  {group}"
    for option, file in sorted(options.items()):
        mark = "*" if catalog.defaults[group] == option else " "
        yield f"  {mark} {option:<{width}}  {next(iter(header(file)), '')}".rstrip()


def _fields(cls: type, path: str = "", skip: Container[str] = ()) -> Iterator[tuple[str, str]]:
    defaults = schema(cls)
    for name, annotation in field_hints(cls).items():
        arms = dataclass_arms(annotation)
        if join(path, name) in skip:
            continue
        if len(arms) == 1 and type(None) not in get_args(annotation):
            yield from _fields(arms[0], join(path, name))
        else:
            value = defaults[name]
            yield join(path, name), "required" if value == MISSING else f"default {json.dumps(value)}"
