"""What Hydra has to know of mbfn: the group `experiment` (the recipes of experiments/) and `${run_digest:}`.

Imported only once Hydra is; jobs of submitit import it with Hydra's list of plugins.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from mbfn.config.build import build
from mbfn.config.groups import experiments_dir
from mbfn.config.run import RunConfig

_GROUP = "experiment"


class ExperimentSource(FileConfigSource):
    """A directory whose files are the options of `experiment`, whatever the directory is called."""

    @staticmethod
    def scheme() -> str:
        return "experiments"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_inner(config_path))

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (_inside(config_path) and super().is_group(_inner(config_path)))

    def is_config(self, config_path: str) -> bool:
        return _inside(config_path) and super().is_config(_inner(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [_GROUP]
        return super().list(_inner(config_path), results_filter)


class ExperimentSearchPath(SearchPathPlugin):
    """Puts experiments/ behind the other directories."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="mbfn", path=f"{ExperimentSource.scheme()}://{experiments_dir()}")


def register() -> None:
    """Make Hydra aware of both; again is nothing."""
    Plugins.instance().register(ExperimentSource)
    Plugins.instance().register(ExperimentSearchPath)


def run_digest(*, _root_: DictConfig) -> str:
    """The digest of the run that a composed tree describes."""
    task = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    tree: Any = OmegaConf.to_container(task, resolve=True)
    return build(RunConfig, tree).digest


OmegaConf.register_new_resolver("run_digest", run_digest, replace=True)


def _inside(path: str) -> bool:
    return path == _GROUP or path.startswith(f"{_GROUP}/")


def _inner(path: str) -> str:
    return path.removeprefix(_GROUP).removeprefix("/") or "."
