"""Hypothesis strategies: small models whose dimensions all differ, and the layouts they can be cut into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import layout_problems
from mbfn.convert.table import table_of

SIZES = (1, 2, 4)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """A dense model of any family; a square matrix would hide a transpose, so no two dimensions are equal."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    groups = draw(st.sampled_from([1, 2, 4]))
    attention_bias = draw(st.booleans()) if family in ("llama", "qwen3") else False
    model = ModelConfig(
        family=family,
        num_layers=draw(st.sampled_from([2, 4, 8])),
        hidden_size=draw(st.integers(13, 23)) * 2,
        ffn_hidden_size=draw(st.integers(13, 18)) * 4,
        num_attention_heads=groups * draw(st.sampled_from([1, 2, 3, 4])) * (4 // groups),
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 6, 10])),
        vocab_size=draw(st.integers(33, 150)),
        max_position_embeddings=128,
        make_vocab_size_divisible_by=draw(st.sampled_from([1, 8, 64])),
        share_embeddings_and_output_weights=draw(st.booleans()),
        add_qkv_bias=family == "qwen2" or attention_bias,
        add_proj_bias=attention_bias,
        add_mlp_bias=draw(st.booleans()) if family == "llama" else False,
        qk_layernorm=family == "qwen3",
    )
    dims = (model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.kv_channels)
    return model if len(set(dims)) == len(dims) else dataclasses.replace(model, hidden_size=model.hidden_size + 1)


@st.composite
def layouts(draw: st.DrawFn, model: ModelConfig) -> ParallelConfig:
    """A layout that `model` can be cut into."""
    pp = draw(st.sampled_from(SIZES))
    candidate = st.builds(
        ParallelConfig,
        tp=st.sampled_from(SIZES),
        pp=st.just(pp),
        vpp=st.sampled_from((1, 2) if pp > 1 else (1,)),
        cp=st.sampled_from((1, 2)),
        dp=st.sampled_from((1, 2)),
    )
    return draw(candidate.filter(lambda parallel: not layout_problems(model, parallel)))


def numbered_weights(model: ModelConfig, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """The model's Hugging Face tensors with every element a number of its own: a misplaced one is seen."""
    return dict(_numbered(model, dtype))


def _numbered(model: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    start = 1
    for name, shape in table_of(model, ParallelConfig()).hf_shapes.items():
        count = math.prod(shape)
        yield name, torch.arange(start, start + count).to(dtype).reshape(shape)
        start += count
