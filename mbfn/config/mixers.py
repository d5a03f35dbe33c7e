"""What may stand in place of attention or the MLP, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mixer = Literal["attention", "gated_delta_net", "mamba", "attention_mamba", "linear", "none"]
"""attention_mamba adds the two up; linear is one matrix, and none leaves the sublayer out with its norm."""
FeedForward = Literal["mlp", "moe", "linear", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig:
    """Mamba-2: a state of fixed size in place of attention, or beside it."""

    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int  # of heads that share what they write to the state and read from it
    conv_kernel: int = 4  # tokens that the convolution before the state sees
    conv_bias: bool = True
    proj_bias: bool = False
    chunk_size: int = 128  # tokens that kernels take at a time
    rms_norm: bool = True  # of the gated output, in each group
    norm_before_gate: bool = False
    time_step_min: float = 0.0  # least step that a token moves the state by

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Of values and of keys."""
        return self.mamba_head_dim, self.mamba_state_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNetConfig:
    """Gated delta net: a matrix a head that each token corrects, in place of attention."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Of values and of keys."""
        return self.linear_value_head_dim, self.linear_key_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplierConfig:
    """Constants that a width-independent parametrisation puts on activations."""

    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    key_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)  # of z, x, B, C and dt
    mlp_multipliers: tuple[float, float] = (1.0, 1.0)  # of the gate and of the output
