"""Configurations for the data tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mbfn.config.data import ChatData, IndexedData, MockData, TextData
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import InitConfig, TrainConfig

KINDS = {"text": TextData, "indexed": IndexedData, "chat": ChatData}


def make_run(
    cache: Path,
    *,
    vocab_size: int = 400,
    dp: int = 1,
    init: str | None = None,
    data: dict[str, Any] | None = None,
    **train: int,
) -> RunConfig:
    """A run over a tiny model; `data` and `train` fields on top of small defaults."""
    model = ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
    )
    sizes = {"steps": 4, "seq_length": 16, "global_batch_size": 8, "micro_batch_size": 2, "eval_batches": 1} | train
    fields = data or {}
    return RunConfig(
        model=model,
        parallel=ParallelConfig(dp=dp),
        data=KINDS[fields.get("kind", "text")](cache=str(cache), **fields),
        train=TrainConfig(**sizes),
        init=InitConfig(hf=init),
    )


def mock_run(**train: int) -> RunConfig:
    """The same over random tokens."""
    return replace(make_run(Path("unused"), **train), data=MockData())
