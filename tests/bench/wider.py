"""Tiny models made as wide as a GPU's kernels want them."""

from __future__ import annotations

import copy
import re

from transformers import PretrainedConfig, PreTrainedModel

WIDTHS = re.compile(r".*(hidden_size|intermediate_size|lora_rank|latent_size)")
HEADS = re.compile(r".*(head_dim|d_head|state_size|d_state)")


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """A model as this one, widths twice as large and multiples of 64, those of heads of 32."""
    config = copy.deepcopy(model.config)
    text = getattr(config, "text_config", config)
    turning = text.rotary_dim / text.head_dim if hasattr(text, "rotary_dim") else 1.0
    for name, value in list(vars(text).items()):
        if isinstance(value, int) and WIDTHS.fullmatch(name):
            setattr(text, name, -(-2 * value // 64) * 64)
        elif isinstance(value, int) and HEADS.fullmatch(name):
            setattr(text, name, -(-2 * value // 32) * 32)
    _agree(config, text, turning)
    return type(model)(config)


def _agree(config: PretrainedConfig, text: PretrainedConfig, turning: float) -> None:
    """Sizes that follow from others, `turning` being the share of a head that turns."""
    text.hidden_size = max(text.hidden_size, 32 * text.num_attention_heads)
    if hasattr(text, "qk_rope_head_dim"):
        text.qk_head_dim = text.qk_nope_head_dim + text.qk_rope_head_dim
    if hasattr(text, "mamba_d_ssm"):
        text.mamba_d_ssm = text.mamba_n_heads * text.mamba_d_head
    if hasattr(getattr(config, "vision_config", None), "out_hidden_size"):
        config.vision_config.out_hidden_size = text.hidden_size
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    if hasattr(text, "rotary_dim"):
        text.rotary_dim = int(size * turning)
        rope["partial_rotary_factor"] = turning  # releases of transformers differ in which of the two they read
    if "mrope_section" in rope:
        rope["mrope_section"] = [size // 2 - size // 6 * 2, size // 6, size // 6]
    if "long_factor" in rope:
        rope["partial_rotary_factor"] = 0.75
        for name in ("short_factor", "long_factor"):
            rope[name] = [factor for factor in rope[name] for _ in range(size * 3 // 8 // len(rope[name]))]
