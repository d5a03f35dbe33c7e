"""Megatron checkpoints that are not of the model: one line for each fault, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.table import table_of
from mbfn.errors import CheckpointError, ConfigError, ConversionError
from mbfn.storage import Chunk, open_torch_dist, save_hf, write_torch_dist
from mbfn.storage.conversions import Care
from mbfn.storage.jobs import checkpoint_to_checkpoint, checkpoint_to_hf, hf_to_checkpoint
from mbfn.storage.resume import Effort
from mbfn.storage.workers import bounded, peak

MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=50,
    max_position_embeddings=64,
)
DOWN = "decoder.layers.mlp.linear_fc2.weight"
type Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    root = tmp_path_factory.mktemp("model")
    shapes = table_of(MODEL, ParallelConfig()).hf_shapes
    save_hf(root / "hf", {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, MODEL)
    hf_to_checkpoint(root / "hf", root / "megatron", ParallelConfig())
    with open_torch_dist(root / "megatron") as checkpoint:
        return dict(checkpoint)


def written(tensors: Tensors, path: Path, model: ModelConfig | None = MODEL) -> Path:
    chunks = [
        Chunk(key=k, global_shape=tuple(t.shape), offset=(0,) * t.ndim, shape=tuple(t.shape), dtype=t.dtype, data=t)
        for k, t in tensors.items()
    ]
    write_torch_dist(path, chunks, model=model)
    return path


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != DOWN}, f"{DOWN}: missing; expected shape [2, 24, 40]"),
    "unknown": (lambda t: {**t, "decoder.gate": torch.ones(3)}, "decoder.gate: no rule of family llama for this key"),
    "transposed": (
        lambda t: {**t, DOWN: t[DOWN].transpose(1, 2).contiguous()},
        f"{DOWN}: expected shape [2, 24, 40], found [2, 40, 24]",
    ),
    "one layer more": (
        lambda t: {**t, DOWN: torch.cat([t[DOWN], t[DOWN][:1]])},
        f"{DOWN}: expected shape [2, 24, 40], found [3, 24, 40]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_not_the_models(fault: str, tensors: Tensors, tmp_path: Path) -> None:
    spoil, line = FAULTS[fault]
    source = written(spoil(tensors), tmp_path / "megatron")
    for convert in (
        lambda: checkpoint_to_hf(source, tmp_path / "out"),
        lambda: checkpoint_to_checkpoint(source, tmp_path / "out", ParallelConfig(tp=2)),
    ):
        with pytest.raises(ConversionError) as caught:
            convert()
        assert str(caught.value) == f"{source}: {line}"
    assert {entry.name for entry in tmp_path.iterdir()} == {"megatron"}


def test_moments_of_another_shape(tensors: Tensors, tmp_path: Path) -> None:
    flat = {**tensors, f"optimizer.state.exp_avg.{DOWN}": torch.zeros(17)}
    source = written(flat, tmp_path / "megatron")
    with pytest.raises(ConversionError, match=r"expected the shape of a weight, found \[17\]; only fully_reshardable"):
        checkpoint_to_checkpoint(source, tmp_path / "out", ParallelConfig(tp=2))
    checkpoint_to_hf(source, tmp_path / "hf")  # which has no use for them


def test_moments_move_and_strangers_stay(tensors: Tensors, tmp_path: Path) -> None:
    moments = {f"optimizer.state.exp_avg.{key}": torch.randn(t.shape) for key, t in tensors.items()}
    everything = {**tensors, **moments, "rng_state": torch.arange(5)}
    source = written(everything, tmp_path / "megatron")
    checkpoint_to_checkpoint(source, tmp_path / "out", ParallelConfig(tp=2, pp=2))
    with open_torch_dist(tmp_path / "out") as found:
        assert found.keys() == everything.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in everything.items())
        assert [len(found.meta(f"optimizer.state.exp_avg.{DOWN}").chunks), len(found.meta("rng_state").chunks)] == [
            4,
            1,
        ]


def test_a_checkpoint_that_says_nothing_of_its_model(tensors: Tensors, tmp_path: Path) -> None:
    source = written(tensors, tmp_path / "megatron", None)
    with pytest.raises(CheckpointError, match=r"says nothing of its model; name a Hugging Face directory"):
        checkpoint_to_hf(source, tmp_path / "out")
    checkpoint_to_hf(source, tmp_path / "out", model=MODEL, care=Care(nan=True))


def test_a_layout_that_does_not_fit(tensors: Tensors, tmp_path: Path) -> None:
    source = written(tensors, tmp_path / "megatron")
    with pytest.raises(ConfigError, match="tp"):
        checkpoint_to_checkpoint(source, tmp_path / "out", ParallelConfig(tp=3))


def test_memory_bounds_the_buffers() -> None:
    for memory, workers, cast in ((512 << 20, 1, False), (64 << 20, 2, True), (24 << 20, 2, False)):
        effort = bounded(Effort(threads=2), memory, workers=workers, cast=cast)
        assert peak(effort, workers=workers, cast=cast) <= memory
    with pytest.raises(ConfigError, match=r"^memory: expected at least 9MiB for so many threads"):
        bounded(Effort(threads=2), 8 << 20, workers=1, cast=False)
