"""Rotary frequencies of a model, with every scaling that its config can name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mbfn.config.model import ModelConfig, RopeScaling


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Radians a token for each pair of head channels, in fp32. Shapes: (kv_channels // 2,).

    Source: transformers@modeling_rope_utils.py, in its order of operations.
    """
    exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.int64, device="cpu").float() / model.kv_channels
    plain = 1.0 / (model.rotary_base**exponents)
    scaling = model.rope_scaling
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling) if scaling.rope_type == "llama3" else plain


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Short wavelengths stay, long ones are stretched by the factor, those between are interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > context / low, plain / scaling.factor, plain)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    medium = ~(wavelength < context / high) * ~(wavelength > context / low)
    return torch.where(medium, between, stretched)
