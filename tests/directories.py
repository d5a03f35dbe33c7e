"""Hugging Face directories that several tests convert."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_directory(directory: Path) -> Path:
    """A tiny Qwen3 in bf16, 47 tensors in three shards, with a file that conversion carries over."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=10,
        max_position_embeddings=128,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    return directory
