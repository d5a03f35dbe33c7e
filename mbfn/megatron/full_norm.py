"""Queries and keys normed over all heads together, which Megatron has only for each head by itself."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mbfn.megatron.modules import new_device


class FullNormSelfAttention(SelfAttention):
    """Self-attention with such norms. They are no part of the spec: Megatron would sum their gradients over ranks."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        tp, dim = self.pg_collection.tp, self.hidden_size_per_attention_head
        self.q_layernorm = FullNorm(config, self.num_attention_heads_per_partition * dim, tp)
        self.k_layernorm = FullNorm(config, self.num_query_groups_per_partition * dim, tp)


class FullNorm(nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks; each has the weights of its own."""

    def __init__(self, config: TransformerConfig, size: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, tp_group
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=new_device(config)))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (S, B, N / tp, D) -> the same."""
        flat = x.flatten(2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        mean = squares / (flat.size(-1) * self.tp_group.size())
        normed = (flat * torch.rsqrt(mean + self.eps)).type_as(x)
        return (normed * self.weight).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, cut over tensor-parallel ranks."""
        assert metadata is not None
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)
