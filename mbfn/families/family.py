"""What a family is: the way its `config.json` speaks, and its table of weight rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mbfn.config.model import ModelConfig
from mbfn.families.hf_config import Dialect
from mbfn.families.rule import Form, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of Hugging Face, as data."""

    dialect: Dialect
    rules: Callable[[ModelConfig, Form], tuple[Rule, ...]]
