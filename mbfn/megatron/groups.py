"""Which ranks talk to which: every process group of a layout as lists of ranks, and the groups themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mbfn.config.parallel import ParallelConfig

Ranks = tuple[tuple[int, ...], ...]

# Megatron's name of a group -> the axes that its members differ in.
_DENSE = {
    "tp": "tp",
    "cp": "cp",
    "dp": "dp",
    "pp": "pp",
    "dp_cp": "cp dp",
    "tp_cp": "tp cp",
    "tp_dp_cp": "tp cp dp",
    "mp": "tp pp",
    "intra_dist_opt": "tp cp dp pp",
}
_EXPERT = {
    "ep": "ep",
    "expt_tp": "etp",
    "expt_dp": "edp",
    "tp_ep": "etp ep",
    "tp_ep_pp": "etp ep pp",
}


def group_ranks(parallel: ParallelConfig) -> dict[str, Ranks]:
    """Every group name of `ProcessGroupCollection` with the ranks of each of its groups."""
    world = parallel.world_size
    dense = {"tp": parallel.tp, "cp": parallel.cp, "dp": parallel.data_parallel_size, "pp": parallel.pp}
    edp = world // (parallel.etp * parallel.ep * parallel.pp)
    expert = {"etp": parallel.etp, "ep": parallel.ep, "edp": edp, "pp": parallel.pp}
    ranks = {name: _slices(dense, axes.split()) for name, axes in _DENSE.items()}
    ranks |= {name: _slices(expert, axes.split()) for name, axes in _EXPERT.items()}
    ranks["embd"] = tuple(tuple(dict.fromkeys((stages[0], stages[-1]))) for stages in ranks["pp"])
    ranks["pos_embd"] = tuple((stages[0],) for stages in ranks["pp"])
    return ranks | _instances(parallel, dense, expert) | _levels(parallel, ranks["cp"])


def _instances(parallel: ParallelConfig, dense: Mapping[str, int], expert: Mapping[str, int]) -> dict[str, Ranks]:
    """Groups of the copies of the optimizer's state: inside each, and between the places of all."""
    copies = parallel.num_distributed_optimizer_instances
    if copies == 1:
        return {}
    apart: dict[str, dict[str, int]] = {}
    for name, sizes, axes in (("dense", dense, ("cp", "dp")), ("expert", expert, ("edp",))):
        inner = math.prod(sizes[axis] for axis in axes) // copies
        kept = {axis: size for axis, size in sizes.items() if axis not in (*axes, "pp")}
        apart[name] = kept | {"inner": inner, "outer": copies, "pp": sizes["pp"]}
    return {
        "intra_dp_cp": _slices(apart["dense"], ["inner"]),
        "intra_expt_dp": _slices(apart["expert"], ["inner"]),
        "inter_dist_opt": _slices(apart["dense"], ["outer"]),
        "intra_dist_opt": _slices(apart["dense"], ["tp", "inner", "pp"]),
    }


def _levels(parallel: ParallelConfig, cp: Ranks) -> dict[str, Ranks]:
    """Groups of hierarchical context parallelism: neighbours exchange heads, their groups pass keys on."""
    sizes = parallel.hierarchical_context_parallel_sizes
    if not sizes:
        return {}
    inner, outer = sizes
    near = tuple(group[i * inner : (i + 1) * inner] for group in cp for i in range(outer))
    return {"hcp_a2a": near, "hcp_p2p": tuple(group[i::inner] for group in cp for i in range(inner))}


def open_groups(ranks: Mapping[str, Ranks], timeout: timedelta) -> ProcessGroupCollection:
    """This rank's process group of every name. Collective. Names with the same members share one group."""
    me = dist.get_rank()
    made: dict[Ranks, dist.ProcessGroup | None] = {}
    groups = ProcessGroupCollection()
    for name, enumeration in ranks.items():
        if enumeration not in made:
            made[enumeration] = _open(enumeration, me, timeout)
        setattr(groups, name, made[enumeration])
    if "hcp_a2a" in ranks:
        groups.hcp = [groups.hcp_a2a, groups.hcp_p2p]
    return groups


def _open(enumeration: Ranks, me: int, timeout: timedelta) -> dist.ProcessGroup | None:
    mine = None
    for members in enumeration:
        group = dist.new_group(list(members), timeout=timeout)
        if me in members:
            mine = group
    return mine


def _slices(sizes: Mapping[str, int], axes: list[str]) -> Ranks:
    """The rank lists that differ in `axes` alone, with the first name of `sizes` fastest."""
    names = list(sizes)[::-1]
    grid = torch.arange(math.prod(sizes.values())).view([sizes[name] for name in names])
    kept = [i for i, name in enumerate(names) if name not in axes]
    moved = [i for i, name in enumerate(names) if name in axes]
    table = grid.permute(kept + moved).reshape(-1, math.prod(sizes[names[i]] for i in moved))
    return tuple(tuple(row) for row in table.tolist())
