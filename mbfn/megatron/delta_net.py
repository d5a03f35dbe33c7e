"""Gated delta net. Megatron's own module needs kernels to be built at all; names and shapes here are its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mbfn.config.mixers import GatedDeltaNetConfig
from mbfn.megatron.modules import new_device
from mbfn.megatron.packed import Segments
from mbfn.megatron.recurrent import HeadNorm, StateMixer, new_parameter
from mbfn.megatron.scans import Scans


class GatedDeltaNet(StateMixer):
    """Keys and values corrected into a matrix a head, which forgets by a gate; read by the queries."""

    cut = ("A_log", "dt_bias")
    channels = slice(0, 3)

    def __init__(
        self,
        config: TransformerConfig,
        sizes: GatedDeltaNetConfig,
        projections: tuple[Any, Any],
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config, projections, pg_collection)
        self.sizes, self.head_sizes = sizes, sizes.head_sizes
        keys = sizes.linear_num_key_heads * sizes.linear_key_head_dim
        values, heads = sizes.linear_num_value_heads * sizes.linear_value_head_dim, sizes.linear_num_value_heads
        tp = self.tp_group.size()
        self.parts = tuple(rows // tp for rows in (keys, keys, values, values, heads, heads))  # q k v gate beta alpha
        self.project(tp * sum(self.parts), values)
        wide, kernel = sum(self.parts[self.channels]), sizes.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(
            wide, wide, kernel, groups=wide, bias=False, dtype=config.params_dtype, device=new_device(config)
        )
        self.conv1d.weight = new_parameter(config, wide, 1, kernel)
        self.A_log, self.dt_bias = new_parameter(config, heads // tp), new_parameter(config, heads // tp)
        self.out_norm = HeadNorm(config, sizes.linear_value_head_dim, self.tp_group)

    def mixed(self, projected: Tensor, scans: Scans, rows: Segments | None) -> Tensor:
        """Shapes: (B, S, rows / tp) -> (B, S, values / tp)."""
        wide, sizes = sum(self.parts[self.channels]), self.sizes
        qkv, gate, beta, alpha = projected.split([wide, *self.parts[3:]], dim=-1)
        qkv = scans.convolution(qkv, self.conv1d.weight, None, rows)
        query, key, value = qkv.split(self.parts[self.channels], dim=-1)
        query, key = (x.unflatten(-1, (-1, sizes.linear_key_head_dim)) for x in (query, key))
        value, gate = (x.unflatten(-1, (-1, sizes.linear_value_head_dim)) for x in (value, gate))
        decay = -self.A_log.float().exp() * F.softplus(alpha.float() + self.dt_bias)
        out = scans.delta(query, key, value, decay, beta.sigmoid(), rows)
        return (self.out_norm(out) * F.silu(gate.float())).to(out.dtype).flatten(2)
