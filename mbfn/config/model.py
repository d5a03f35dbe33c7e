"""The shape of a decoder-only language model: the `model` group. Names are Megatron-core's, else transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mbfn.config.parallel import ParallelConfig
from mbfn.errors import ConfigError, require

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Frequencies rescaled for contexts longer than those trained on (transformers' `rope_scaling`)."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are those of the published model: nothing here depends on a layout."""

    family: str  # a name of `mbfn.families()`
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    kv_channels: int  # head dim
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    add_proj_bias: bool = False  # on the attention output projection
    add_mlp_bias: bool = False
    qk_layernorm: bool = False
    window_size: int | None = None  # sliding attention window in tokens, this one included; none: the whole past
    window_layers: tuple[int, ...] = ()  # layers that use the window; empty: all of them
    init_method_std: float = 0.02
    params_dtype: Dtype = "bf16"  # of the published weights
    make_vocab_size_divisible_by: int = 128
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name in _POSITIVE:
            size = getattr(self, name)
            require(size >= 1, name, f"expected at least 1, got {size}", problems)
        if not problems:
            require(
                self.num_attention_heads % self.num_query_groups == 0,
                "num_query_groups",
                f"expected a divisor of num_attention_heads={self.num_attention_heads}, got {self.num_query_groups}",
                problems,
            )
        outside = [i for i in self.window_layers if not 0 <= i < self.num_layers]
        require(not outside, "window_layers", f"expected layers 0 to {self.num_layers - 1}, got {outside}", problems)
        if problems:
            raise ConfigError(problems)

    @property
    def num_parameters(self) -> int:
        """Parameters of the published model, tied embeddings counted once, padding not at all."""
        return _layer_parameters(self) * self.num_layers + _outer_parameters(self)


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
)


def padded_vocab_size(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of `make_vocab_size_divisible_by` and tp.

    A least common multiple, so every tp that divides `make_vocab_size_divisible_by` gives the same size and
    checkpoints reshard exactly.
    """
    multiple = math.lcm(model.make_vocab_size_divisible_by, parallel.tp)
    return -(-model.vocab_size // multiple) * multiple


def _layer_parameters(model: ModelConfig) -> int:
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    q, kv = model.num_attention_heads * d, model.num_query_groups * d
    weights = h * (q + 2 * kv) + q * h + 3 * h * f + 2 * h
    biases = model.add_qkv_bias * (q + 2 * kv) + model.add_proj_bias * h + model.add_mlp_bias * (2 * f + h)
    return weights + biases + model.qk_layernorm * 2 * d


def _outer_parameters(model: ModelConfig) -> int:
    embeddings = 1 if model.share_embeddings_and_output_weights else 2
    return embeddings * model.vocab_size * model.hidden_size + model.hidden_size
