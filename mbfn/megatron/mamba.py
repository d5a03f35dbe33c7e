"""Mamba-2. Megatron's own module needs kernels to be built at all.

Names and shapes are its own. Source: "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mbfn.config.mixers import MambaConfig
from mbfn.megatron.packed import Segments
from mbfn.megatron.recurrent import StateMixer, new_parameter
from mbfn.megatron.scans import Scans


class Mamba(StateMixer):
    """A state a head that decays by a step that each token chooses, written and read through shared vectors."""

    cut = ("conv1d_weight", "conv1d_bias", "A_log", "D", "dt_bias")
    channels = slice(1, 4)

    def __init__(
        self,
        config: TransformerConfig,
        sizes: MambaConfig,
        projections: tuple[Any, Any],
        pg_collection: ProcessGroupCollection,
        *,
        multipliers: tuple[float, ...] = (1.0,) * 5,
        **_: Any,
    ) -> None:
        super().__init__(config, projections, pg_collection)
        self.sizes, self.multipliers, self.head_sizes = sizes, multipliers, sizes.head_sizes
        heads, inner = sizes.mamba_num_heads, sizes.mamba_num_heads * sizes.mamba_head_dim
        states, tp = sizes.mamba_num_groups * sizes.mamba_state_dim, self.tp_group.size()
        self.parts = tuple(rows // tp for rows in (inner, inner, states, states, heads))  # z x B C dt
        self.project(tp * sum(self.parts), inner, bias=sizes.proj_bias)
        wide = sum(self.parts[self.channels])
        self.conv1d_weight = new_parameter(config, wide, 1, sizes.conv_kernel)
        self.register_parameter("conv1d_bias", new_parameter(config, wide) if sizes.conv_bias else None)
        self.A_log, self.D, self.dt_bias = (new_parameter(config, heads // tp) for _ in range(3))
        groups = sizes.mamba_num_groups // tp
        self.norm = GroupNorm(config, inner // tp, groups, self.tp_group) if sizes.rms_norm else None

    def mixed(self, projected: Tensor, scans: Scans, rows: Segments | None) -> Tensor:
        """Shapes: (B, S, rows / tp) -> (B, S, inner / tp)."""
        sizes, wide = self.sizes, sum(self.parts[self.channels])
        if any(factor != 1.0 for factor in self.multipliers):
            factors = [projected.new_full((n,), by) for n, by in zip(self.parts, self.multipliers, strict=True)]
            projected = projected * torch.cat(factors)
        gate, xbc, step = projected.split([self.parts[0], wide, self.parts[-1]], dim=-1)
        xbc = scans.convolution(xbc, self.conv1d_weight, self.conv1d_bias, rows)
        x, write, read = xbc.split(self.parts[self.channels], dim=-1)
        step = F.softplus(step.float() + self.dt_bias.float()).clamp(min=sizes.time_step_min)
        x = x.unflatten(-1, (-1, sizes.mamba_head_dim))
        write, read = (y.unflatten(-1, (-1, sizes.mamba_state_dim)) for y in (write, read))
        out = scans.decayed(x, step, -self.A_log.float().exp(), write, read, sizes.chunk_size, rows)
        out = (out + self.D.float()[:, None] * x).flatten(2)
        return self._gated(out, gate.float()).type_as(projected)

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        if self.norm is None:
            return out * F.silu(gate)
        if self.sizes.norm_before_gate:
            return self.norm(out) * F.silu(gate)
        return self.norm(out * F.silu(gate))

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The convolution goes by the name that it has as a module."""
        found = super().sharded_state_dict(prefix, *args, **kwargs)
        for kind in ("weight", "bias"):
            entry = found.get(f"{prefix}conv1d_{kind}")
            if entry is not None:
                entry.key = entry.key.replace("conv1d_", "conv1d.")
        return found


class GroupNorm(nn.Module):
    """RMSNorm over each group of heads; a rank has groups of its own."""

    def __init__(
        self, config: TransformerConfig, size: int, groups: int, tp_group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps, self.groups, self.tp_group = config.layernorm_epsilon, groups, tp_group
        self.weight = new_parameter(config, size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., inner / tp) -> the same."""
        grouped = x.unflatten(-1, (self.groups, -1))
        return self.weight * F.rms_norm(grouped, grouped.shape[-1:], None, self.eps).flatten(-2)
