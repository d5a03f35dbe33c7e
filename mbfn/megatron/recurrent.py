"""What mixers with a state share: projections, parts cut one by one, a norm of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from mbfn.megatron.modules import new_device
from mbfn.megatron.packed import Segments
from mbfn.megatron.scans import Scans, choose_scans

_CUT_MODULES = ("conv1d", "norm")  # modules whose weights have a share of every rank's


class StateMixer(MegatronModule):
    """Projection, convolution, recurrence, projection; each tensor-parallel rank has heads of its own.

    Subclasses give `parts` of the input projection's rows and `mixed`, what becomes of them.
    """

    cut: tuple[str, ...] = ()  # parameters of this module's own that are cut over their first dimension
    parts: tuple[int, ...] = ()  # rows of `in_proj` on this rank, block by block
    channels: slice = slice(0)  # of them, the blocks that the convolution sees
    head_sizes: tuple[int, ...] = ()

    def __init__(
        self, config: TransformerConfig, projections: tuple[Any, Any], pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group, self.projections = pg_collection.tp, projections

    def project(self, rows: int, inner: int, *, bias: bool = False) -> None:
        """Make `in_proj` of `rows` outputs and `out_proj` of `inner` inputs, over all ranks."""
        config = self.config
        shared = {"config": config, "bias": bias, "is_expert": False, "tp_group": self.tp_group}
        into, out = (p if isinstance(p, ModuleSpec) else ModuleSpec(module=p) for p in self.projections)
        del self.projections
        self.in_proj = build_module(
            into, config.hidden_size, rows, init_method=config.init_method, gather_output=False, skip_bias_add=False,
            tp_comm_buffer_name="fc1", **shared,
        )  # fmt: skip
        self.out_proj = build_module(
            out, inner, config.hidden_size, init_method=config.output_layer_init_method, input_is_parallel=True,
            skip_bias_add=True, tp_comm_buffer_name="fc2", **shared,
        )  # fmt: skip

    def forward(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: Segments | None = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes: (S, B, H) -> (S, B, H); samples of a packed row start from an empty state."""
        projected, _ = self.in_proj(hidden_states)
        scans = choose_scans(projected.device, projected.dtype, self.head_sizes)[0]
        mixed = self.mixed(projected.transpose(0, 1), scans, packed_seq_params)
        return self.out_proj(mixed.transpose(0, 1).contiguous())

    def mixed(self, projected: Tensor, scans: Scans, rows: Segments | None) -> Tensor:
        """Shapes: (B, S, rows / tp) -> (B, S, inner / tp)."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_: Any
    ) -> dict[str, Any]:
        """Every part of a joined tensor as a box of its own: another number of ranks cuts each of them elsewhere."""
        assert metadata is not None
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        found = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(self.cut, 0), sharded_offsets, **groups)
        for name, module in self.named_children():
            at = f"{prefix}{name}."
            if name in _CUT_MODULES:
                weights = module.state_dict(keep_vars=True)
                found |= make_sharded_tensors_for_checkpoint(weights, at, {"weight": 0}, sharded_offsets, **groups)
            else:
                found |= sharded_state_dict_default(module, at, sharded_offsets, metadata, self.tp_group)
        for name, parts in {"in_proj": self.parts, "conv1d": self.parts[self.channels]}.items():
            for key in [key for key in found if key.startswith(f"{prefix}{name}") and found[key].data is not None]:
                if found[key].data.size(0) == sum(parts):
                    found[key] = in_parts(found[key], parts, self.tp_group)
        return found


def new_parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """A parameter of this rank's heads."""
    made = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=new_device(config)))
    set_tensor_model_parallel_attributes(made, is_parallel=True, dim=0, stride=1)
    return made


def in_parts(entry: ShardedTensor, parts: Sequence[int], group: torch.distributed.ProcessGroup) -> ShardedTensorFactory:
    """The entry of a tensor whose first dimension is cut part by part, `parts` being this rank's lengths."""
    bare, axis, size, rank = entry.without_data(), entry.prepend_axis_num, group.size(), group.rank()

    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        del flattened_range
        boxes, before = [], 0
        for piece in tensor.split(list(parts)):
            offset = list(bare.global_offset)
            offset[axis] = before * size + rank * len(piece)
            place = {"local_shape": tuple(piece.shape), "global_offset": tuple(offset), "axis_fragmentations": None}
            boxes.append(replace(bare, key=key, data=piece, dtype=piece.dtype, replica_id=replica_id, **place))
            before += len(piece)
        return boxes

    return ShardedTensorFactory(entry.key, entry.data, build, torch.cat, entry.replica_id)


class HeadNorm(nn.Module):
    """RMSNorm with weights that all ranks' heads share: its gradient is the sum over them."""

    def __init__(self, config: TransformerConfig, size: int, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=new_device(config)))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., D) -> (..., D)."""
        weight = self.weight
        if self.group.size() > 1:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.group)
        return weight * F.rms_norm(x.float(), weight.shape, None, self.eps).type_as(x)
