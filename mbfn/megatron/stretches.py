"""The stretch of each weight's flattened elements that a rank holds, where weights are cut over data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Elements `[start, start + flat.numel())` of a weight; `flat` shares the rank's memory."""

    flat: Tensor
    start: int
    group: dist.ProcessGroup  # the ranks that hold the others


def stretch(param: Any, own: DTensor | None = None) -> Stretch:
    """What this rank holds of a weight, or of `own`, a state that is cut as the weight is."""
    flat = (param if own is None else own).to_local().detach().reshape(-1)
    original: Any = getattr(param, "orig_param", None)
    if original is None:  # FSDP2 cuts the first axis in even parts, the last ones smaller
        mesh = param.device_mesh
        rows = -(-param.shape[0] // mesh.size())
        start = min(mesh.get_local_rank() * rows, param.shape[0]) * (param.numel() // param.shape[0])
        return Stretch(flat=flat, start=start, group=mesh.get_group())
    expert = not getattr(original, "allreduce", True)
    group = param.megatron_fsdp_dist_index.get_dp_group(is_expert_parallel=expert)
    return Stretch(flat=flat, start=_start(flat.numel(), group), group=group)


def _start(count: int, group: dist.ProcessGroup) -> int:
    """Megatron-FSDP cuts where its buffers end: a rank's elements follow those of the ranks before it. Collective."""
    counts: list[int] = [0] * group.size()
    dist.all_gather_object(counts, count, group=group)
    return sum(counts[: group.rank()])


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of a tensor of which ranks hold stretches. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    own = stretch(tensor)
    shape = getattr(tensor, "orig_param", tensor).shape
    flat = torch.zeros(shape.numel(), dtype=own.flat.dtype, device=own.flat.device)
    flat[own.start : own.start + own.flat.numel()] = own.flat
    dist.all_reduce(flat, group=own.group)  # one rank has each element, the others zero
    return flat.view(shape).to(dtype or flat.dtype)
