"""Where configuration files lie, and which groups and options they make."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mbfn.config.names import hint
from mbfn.errors import ConfigError

ENV = "MBFN_CONF"  # directories of a user's own groups, separated as in PATH


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What one command composes from: its frozen root class, primary file, groups, and users' directories."""

    root: type
    config_name: str
    primary: Path  # the file of the command's own fields and defaults list
    user_dirs: tuple[Path, ...]
    options: Mapping[str, Mapping[str, Path]]  # group -> option -> file
    defaults: Mapping[str, str | None]  # group -> option of the primary file's defaults list


def catalog(root: type, config_name: str, extra_dirs: Iterable[str | Path] = ()) -> Catalog:
    """Read the directories once: ours, those of `MBFN_CONF`, then `extra_dirs`.

    Raises: ConfigError for a directory that is not there, or one option in two of them.
    """
    from_env = [part for part in os.environ.get(ENV, "").split(os.pathsep) if part]
    user_dirs = tuple(Path(part).expanduser().absolute() for part in [*from_env, *extra_dirs])
    for directory in user_dirs:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: expected a directory of configuration groups (--config-dir, {ENV})")
    primary = _primary(config_name, user_dirs)
    return Catalog(
        root=root,
        config_name=config_name,
        primary=primary,
        user_dirs=user_dirs,
        options=_options(user_dirs),
        defaults=_defaults(primary),
    )


def conf_dir() -> Path:
    """The directory of our groups: inside an installed package, beside it in a checkout."""
    return _packaged("conf")


def experiments_dir() -> Path:
    """The directory of whole recipes, the options of the group `experiment`."""
    return _packaged("experiments")


def header(file: Path) -> list[str]:
    """The comment lines that a configuration file begins with, without those that speak to Hydra."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return [line[1:].removeprefix(" ") for line in lines if not line.startswith("# @")]


def _packaged(name: str) -> Path:
    package = Path(__file__).resolve().parent.parent
    for place in (package / name, package.parent / name):
        if place.is_dir():
            return place
    raise ConfigError(f"{package / name}: the directory of configuration files is missing; reinstall mbfn")


def _primary(config_name: str, user_dirs: Iterable[Path]) -> Path:
    for directory in (conf_dir(), *user_dirs):
        if (directory / f"{config_name}.yaml").is_file():
            return directory / f"{config_name}.yaml"
    names = [path.stem for path in conf_dir().glob("*.yaml")]
    raise ConfigError([("--config-name", f"no {config_name}.yaml in {conf_dir()}; {hint(config_name, names)}")])


def _options(user_dirs: Iterable[Path]) -> dict[str, dict[str, Path]]:
    found: dict[str, dict[str, Path]] = {}
    for directory, prefix in [(conf_dir(), ""), (experiments_dir(), "experiment"), *((d, "") for d in user_dirs)]:
        for file in sorted(directory.rglob("*.yaml")):
            parts = (*([prefix] if prefix else []), *file.relative_to(directory).with_suffix("").parts)
            for cut in range(1, len(parts)):
                group, option = "/".join(parts[:cut]), "/".join(parts[cut:])
                known = found.setdefault(group, {}).setdefault(option, file)
                if known != file:
                    raise ConfigError([(f"{group}={option}", f"is both {known} and {file}; rename yours")])
    return found


def _defaults(primary: Path) -> dict[str, str | None]:
    import yaml

    content: Any = yaml.safe_load(primary.read_text(encoding="utf-8")) or {}
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    return {
        group: option for entry in entries for group, option in entry.items() if not str(group).startswith("override")
    }
