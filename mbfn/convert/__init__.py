"""Conversion as composition of index maps: the algebra, its plans, and their execution. torch only."""

from mbfn.convert.api import reshard, to_hf, to_megatron

__all__ = ["reshard", "to_hf", "to_megatron"]
