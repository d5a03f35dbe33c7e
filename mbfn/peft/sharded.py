"""Adapters in a distributed checkpoint: which share of each whole tensor a rank holds."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from mbfn.peft.modules import LowRank

_AXES: dict[str, dict[str, int]] = {
    "out": {"linear_out.weight": 0, "magnitude": 0},
    "in": {"linear_in.weight": 1},
    "none": {},
}


def sharded_adapter(adapter: LowRank, prefix: str, offsets: tuple, metadata: dict) -> dict[str, Any]:
    """The tensors of an adapter of one linear."""
    return _sharded(adapter, dict(adapter.state_dict(keep_vars=True)), prefix, offsets, metadata)


def sharded_experts(
    adapter: LowRank, prefix: str, offsets: tuple, metadata: dict, groups: ProcessGroupCollection
) -> dict[str, Any]:
    """The tensors of an adapter of all experts of a rank, under the keys of experts that lie one by one."""
    state, count = adapter.state_dict(keep_vars=True), len(adapter.linear_in.names)
    found: dict[str, Any] = {}
    for place in range(count):
        number = groups.ep.rank() * count + place
        own = {f"{name}.weight": state[f"{name}.weight{place}"] for name in ("linear_in", "linear_out")}
        at = (*offsets, (len(offsets), number, groups.ep.size() * count))
        for key, tensor in _sharded(adapter, own, prefix, at, metadata).items():
            tensor.replica_id = (*tensor.replica_id[:2], groups.expt_dp.rank())
            found[f"{key}{place}"] = tensor
    return found


def _sharded(adapter: LowRank, state: dict[str, Tensor], prefix: str, offsets: tuple, metadata: dict) -> dict[str, Any]:
    axes = {name: axis for name, axis in _AXES[adapter.plan.cut].items() if name in state}
    groups = {"tp_group": adapter.group, "dp_cp_group": metadata["dp_cp_group"]}
    found = make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets, **groups)
    if adapter.plan.gated:
        for name in axes:
            found[prefix + name] = apply_swiglu_sharded_factory(
                found[prefix + name], offsets, tp_group=adapter.group, dp_group=metadata["dp_cp_group"]
            )
    return found
