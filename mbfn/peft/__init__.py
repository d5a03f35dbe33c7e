"""Adapters: transformations of the layer specification, with their weights in and out in PEFT's form."""

from mbfn.peft.modules import MARK, LowRank
from mbfn.peft.transform import LowRankAdaptation

__all__ = ["MARK", "LowRank", "LowRankAdaptation"]
