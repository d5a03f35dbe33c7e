"""Rotary frequencies of a model, with every scaling that its config can name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mbfn.config.model import ModelConfig, RopeScaling


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Radians a token for each pair of head channels that turns, in fp32; with two bases, global ones, then local.

    Source: transformers@modeling_rope_utils.py, in its order of operations.
    """
    scaled = _scaled(plain_frequencies(model, model.rotary_base), model)
    if model.local_rotary_base is None:
        return scaled
    return torch.cat([scaled, plain_frequencies(model, model.local_rotary_base)])


def plain_frequencies(model: ModelConfig, base: float) -> Tensor:
    """Without scaling. Shapes: (rotary_channels // 2,)."""
    channels = rotary_channels(model)
    exponents = torch.arange(0, channels, 2, dtype=torch.int64, device="cpu").float() / channels
    return 1.0 / (base**exponents)


def rotary_channels(model: ModelConfig) -> int:
    """The channels of a head that turn: the first ones."""
    return int(model.kv_channels * model.rotary_percent)


def _scaled(plain: Tensor, model: ModelConfig) -> Tensor:
    scaling = model.rope_scaling
    match scaling.rope_type:
        case "linear":
            return plain / scaling.factor
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, scaling, base=model.rotary_base)
    return plain


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


def _yarn(plain: Tensor, scaling: RopeScaling, *, base: float) -> Tensor:
    """Channels that turn often in the original context stay, slow ones are stretched, a ramp lies between."""
    channels = 2 * len(plain)

    def channel(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return channels * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    width = high - low or 0.001
    stays = 1 - ((torch.arange(len(plain), dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return plain / scaling.factor * (1 - stays) + plain * stays
