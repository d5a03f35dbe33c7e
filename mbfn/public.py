"""`mbfn.compose`: the configuration layer with the family tables put in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mbfn.config.compose import compose as compose_with
from mbfn.config.run import RunConfig
from mbfn.families import model_from_hf


def compose(*overrides: str, conf_dirs: Iterable[str | Path] = ()) -> RunConfig:
    """The run that `python -m mbfn.train` would start with these overrides, as one frozen value.

    `conf_dirs`: directories with groups and options of your own, searched before mbfn's.
    Raises: ConfigError with every problem at once.
    """
    return compose_with(*overrides, conf_dirs=conf_dirs, model_from_hf=model_from_hf)
