"""GPUs as data: published peaks, and the shares of them that training reaches.

The shares were measured on one H200 (docs/plan.md has the rows); for the other devices they are assumed to be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mbfn.config.precision import Fp8Recipe
from mbfn.config.recipes import Capability

DeviceName = Literal["h100", "h200", "b200", "gb200"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU and its network. Rates are dense and per second; bandwidths are of one direction."""

    label: str
    capability: Capability  # of CUDA's kernels
    memory: float  # bytes that the driver offers
    bf16: float
    fp8: float
    fp4: float  # 0: none
    memory_bandwidth: float
    node_size: int  # GPUs that NVLink joins
    link: float  # bytes a second to GPUs of the node
    network: float  # bytes a second to others


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What training reaches of a device's published peaks."""

    gemm: Mapping[Fp8Recipe, float]  # of forward and backward products; "none" of the bf16 peak, others of the FP8 one
    grouped: float = 0.70  # of the same: products of a rank's experts in one kernel, forward and backward
    grouped_apart: float = 0.49  # where each expert has products of its own: in FP8, or widths that 128 does not divide
    attention: float = 0.44  # of the bf16 peak, forward and backward, head dim 128 and more
    attention_narrow: float = 0.355  # the same with a head dim of 64
    passes: float = 8.0  # times that kept activations go through memory in a step, bf16
    passes_fp8: float = 12.0  # the same with casts and maxima
    link: float = 0.59  # of the published NVLink bandwidth, all-gather and reduce-scatter
    network: float = 0.8
    reserved: float = 3 * 2**30  # bytes of contexts, NCCL and fragmentation that a plan leaves free


# Recipes of Blackwell were not measured: they are assumed to reach what the tensorwise one does of its peak.
SHARES = Shares(
    gemm={"none": 0.70, "tensorwise": 0.66, "blockwise": 0.50, "delayed": 0.66, "mxfp8": 0.66, "nvfp4": 0.66}
)

_GIB, _GB, _TERA = 2.0**30, 1e9, 1e12
DEVICES: Mapping[DeviceName, Device] = {
    "h100": Device(
        label="H100 SXM 80 GB",
        capability=(9, 0),
        memory=79.1 * _GIB,
        bf16=989 * _TERA,
        fp8=1979 * _TERA,
        fp4=0.0,
        memory_bandwidth=3.35 * _TERA,
        node_size=8,
        link=450 * _GB,
        network=50 * _GB,
    ),
    "h200": Device(
        label="H200 SXM 141 GB",
        capability=(9, 0),
        memory=139.8 * _GIB,
        bf16=989 * _TERA,
        fp8=1979 * _TERA,
        fp4=0.0,
        memory_bandwidth=4.8 * _TERA,
        node_size=8,
        link=450 * _GB,
        network=50 * _GB,
    ),
    "b200": Device(
        label="B200 SXM 180 GB",
        capability=(10, 0),
        memory=178 * _GIB,
        bf16=2250 * _TERA,
        fp8=4500 * _TERA,
        fp4=9000 * _TERA,
        memory_bandwidth=8 * _TERA,
        node_size=8,
        link=900 * _GB,
        network=50 * _GB,
    ),
    "gb200": Device(
        label="GB200 NVL72 186 GB",
        capability=(10, 0),
        memory=184 * _GIB,
        bf16=2500 * _TERA,
        fp8=5000 * _TERA,
        fp4=10000 * _TERA,
        memory_bandwidth=8 * _TERA,
        node_size=72,
        link=900 * _GB,
        network=50 * _GB,
    ),
}
