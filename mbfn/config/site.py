"""The `site` group: what a cluster's users set once, in one file, for all their runs."""

from __future__ import annotations

from dataclasses import dataclass

from mbfn.errors import ConfigError, require

_TEXTS = ("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "gres", "python")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteConfig:
    """A cluster as Slurm's commands need to know it. An empty text or list and 0 leave the choice to the cluster."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    nodelist: str = ""
    exclude: str = ""
    exclusive: bool = False  # whole nodes
    gpus_per_node: int = 8
    gres: str = "gpu"  # how GPUs are asked for: --gres=<gres>:<number>, for instance gpu:h100; empty: not asked for
    cpu_ranks_per_node: int = 1  # with launch.device=cpu
    cpus_per_rank: int = 0
    mem_gb: int = 0  # a node
    python: str = ""  # of the jobs; empty: the one that submits, in a container `python`
    environment: tuple[str, ...] = ()  # NAME=VALUE for the ranks: network interfaces, caches
    setup: tuple[str, ...] = ()  # lines of the batch script before the ranks start: module load, source
    teardown: tuple[str, ...] = ()  # and after they ended
    container_image: str = ""  # of pyxis: an image file or a name in a registry
    container_mounts: tuple[str, ...] = ()  # SOURCE:TARGET[:FLAGS]
    sbatch_args: tuple[str, ...] = ()  # further options, as --mail-type=END
    srun_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name, least in (("gpus_per_node", 0), ("cpu_ranks_per_node", 1), ("cpus_per_rank", 0), ("mem_gb", 0)):
            value = getattr(self, name)
            require(value >= least, name, f"expected at least {least}, got {value}", problems)
        for name in _TEXTS:
            require("\n" not in getattr(self, name), name, "expected one line", problems)
        for name in ("sbatch_args", "srun_args"):
            for text in getattr(self, name):
                require(text.startswith("-"), name, f"expected options such as --mail-type=END, got {text!r}", problems)
        for text in self.environment:
            require(text.partition("=")[0].isidentifier() and "=" in text, "environment", _not_set(text), problems)
        for text in self.container_mounts:
            require(text.count(":") >= 1, "container_mounts", f"expected SOURCE:TARGET, got {text!r}", problems)
        if problems:
            raise ConfigError(problems)


def _not_set(text: str) -> str:
    return f"expected NAME=VALUE, got {text!r}"
