"""Composition: groups of YAML and overrides -> one frozen value, in a program or as a command.

A program:

    from mbfn.config.compose import compose
    config = compose("model=llama31_70b", "parallel=tp8pp4", "train.steps=500", conf_dirs=["my_conf"])

A command is a frozen dataclass, a primary file and a task. `conf/convert.yaml`:

    # Convert a checkpoint.        <- the header comment is what --help begins with
    defaults:
      - convert_schema             # the root class, `Config` left out, in lower case
      - parallel: single           # groups whose options fill fields of the same name
      - _self_

and `mbfn/convert/__main__.py`:

    @dataclass(frozen=True, slots=True, kw_only=True)
    class ConvertConfig:
        out: str                   # required: no default
        hf: str | None = None
        parallel: ParallelConfig = ParallelConfig()

    def convert(config: ConvertConfig, context: RunContext) -> None: ...

    if __name__ == "__main__":
        hydra_main(convert, root=ConvertConfig, config_name="convert", outputs=False)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mbfn.config.command import RunContext, hydra_main
from mbfn.config.composing import ModelFromHf, resolve
from mbfn.config.groups import catalog
from mbfn.config.run import RunConfig

__all__ = ["RunContext", "compose", "compose_as", "hydra_main"]


def compose(
    *overrides: str, conf_dirs: Iterable[str | Path] = (), model_from_hf: ModelFromHf | None = None
) -> RunConfig:
    """The RunConfig that `python -m mbfn.train` would run with these overrides.

    `conf_dirs` hold groups and options of your own; `model_from_hf` reads the model group from `init.hf`.

    Raises: ConfigError with every problem.
    """
    return compose_as(RunConfig, "config", *overrides, conf_dirs=conf_dirs, model_from_hf=model_from_hf)


def compose_as[T](
    root: type[T],
    config_name: str,
    *overrides: str,
    conf_dirs: Iterable[str | Path] = (),
    model_from_hf: ModelFromHf | None = None,
) -> T:
    """The same for another command's root class and primary file."""
    config: Any = resolve(catalog(root, config_name, conf_dirs), overrides, model_from_hf=model_from_hf)[0]
    return config
