"""Weights on disk: safetensors and Megatron (torch_dist) checkpoints as lazy mappings and atomic writers."""

from mbfn.storage.atomic import atomic_directory, read_manifest
from mbfn.storage.hf import HfDirectory, open_hf
from mbfn.storage.hf_write import Declared, carried_files, save_hf
from mbfn.storage.regions import RegionSource, TensorMeta

__all__ = [
    "Declared",
    "HfDirectory",
    "RegionSource",
    "TensorMeta",
    "atomic_directory",
    "carried_files",
    "open_hf",
    "read_manifest",
    "save_hf",
]
