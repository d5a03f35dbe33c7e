"""Weights on disk: safetensors and Megatron (torch_dist) checkpoints as lazy mappings and atomic writers."""

from mbfn.storage.hf import HfDirectory, open_hf
from mbfn.storage.regions import RegionSource, TensorMeta

__all__ = ["HfDirectory", "RegionSource", "TensorMeta", "open_hf"]
