"""Which weights train: the `peft` group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """`none` trains every weight."""

    kind: Literal["none"] = "none"
