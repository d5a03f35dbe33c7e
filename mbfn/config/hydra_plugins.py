"""The recipes of experiments/ as Hydra's group `experiment`. Imported only once Hydra is."""

from __future__ import annotations

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from mbfn.config.groups import experiments_dir

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


def _inside(path: str) -> bool:
    return path == _GROUP or path.startswith(f"{_GROUP}/")


def _inner(path: str) -> str:
    return path.removeprefix(_GROUP).removeprefix("/") or "."
