"""Adapters: transformations of the layer specification, with their weights in and out in PEFT's form."""

from mbfn.peft.dropout import seed_dropout
from mbfn.peft.modules import LowRank
from mbfn.peft.transform import LowRankAdaptation

__all__ = ["LowRank", "LowRankAdaptation", "seed_dropout"]
