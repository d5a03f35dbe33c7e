"""Self-attention whose layers turn at different rates."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


class TwoBaseSelfAttention(SelfAttention):
    """Takes the angles of both rotary bases and uses those of its own: global, or local where it has a window."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes: rotary_pos_emb (S, 1, 1, 2 * D): the angles global, local, and both once more."""
        own = rotary_pos_emb.unflatten(-1, (2, 2, -1))[..., int(self.local), :].flatten(-2)
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=own, **kwargs)
