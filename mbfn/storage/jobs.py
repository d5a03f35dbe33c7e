"""Whole conversions between directories: Hugging Face -> Megatron checkpoint and back, as streams of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mbfn.config.build import build
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import layout_problems
from mbfn.convert.plans import checkpoint_chunks, checkpoint_hf_plans, checkpoint_shapes
from mbfn.convert.states import check_hf, one_dtype
from mbfn.convert.table import Table, table_of, table_padded
from mbfn.errors import CheckpointError, ConfigError, ConversionError
from mbfn.families import model_from_hf, model_to_hf
from mbfn.storage.atomic import read_manifest
from mbfn.storage.hf import open_hf, read_json
from mbfn.storage.hf_shards import Declared
from mbfn.storage.hf_write import Streamed, carried_files, save_hf
from mbfn.storage.planned import reader
from mbfn.storage.streams import Read
from mbfn.storage.torch_dist import TorchDistCheckpoint, open_torch_dist
from mbfn.storage.torch_dist_write import HF_FOLDER, Chunk, extra_states, write_torch_dist

EMBEDDING = "embedding.word_embeddings.weight"
NOT_WEIGHTS = ("optimizer", "rng_state", "rerun_state", "iteration", "opt_param_scheduler")  # a training run's own

type OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a conversion wrote."""

    tensors: int
    nbytes: int


def hf_to_checkpoint(
    hf_dir: Path, out: Path, parallel: ParallelConfig, *, workers: int = 2, on_bytes: OnBytes | None = None
) -> Done:
    """Write the torch_dist checkpoint that a run in layout `parallel` would save of these weights.

    Raises: ConfigError when the layout does not fit, ConversionError and CheckpointError for bad weights or files.
    """
    model = model_from_hf(hf_dir)
    if problems := layout_problems(model, parallel):
        raise ConfigError(problems)
    with open_hf(hf_dir) as source:
        table = table_of(model, parallel)
        check_hf(table, source, str(hf_dir))
        chunks = [
            Chunk(
                key=chunk.key,
                global_shape=chunk.global_shape,
                offset=chunk.offset,
                shape=chunk.plan.shape,
                dtype=one_dtype(chunk.plan, source),
                data=_counted(reader(chunk.plan, source), on_bytes),
                rank=rank,
            )
            for rank, chunk in checkpoint_chunks(table, parallel)
        ]
        write_torch_dist(
            out,
            chunks,
            objects=extra_states(table),
            common={"checkpoint_version": 3.0},
            content_metadata={"singleton_local_shards": False},
            model=model,
            parallel=parallel,
            config=read_json(hf_dir / "config.json"),
            extra_files=carried_files(hf_dir),
            workers=workers,
        )
    return Done(tensors=len(table.hf_shapes), nbytes=source.nbytes)


def checkpoint_to_hf(
    checkpoint_dir: Path,
    out: Path,
    *,
    model: ModelConfig | None = None,
    workers: int = 2,
    on_bytes: OnBytes | None = None,
) -> Done:
    """Write the Hugging Face directory of a torch_dist checkpoint, whoever saved it.

    `model`: for checkpoints that do not carry their own description.
    Raises: CheckpointError, ConversionError.
    """
    model = model or checkpoint_model(checkpoint_dir)
    carried = checkpoint_dir / HF_FOLDER
    with open_torch_dist(checkpoint_dir) as source:
        table = checkpoint_table(model, source)
        plans = list(checkpoint_hf_plans(table))
        declared = [Declared(name=p.name, shape=p.shape, dtype=one_dtype(p, source)) for p in plans]
        items = (
            (p.name, Streamed(shape=d.shape, dtype=d.dtype, read=_counted(reader(p, source), on_bytes)))
            for p, d in zip(plans, declared, strict=True)
        )
        save_hf(
            out,
            items,
            model,
            plan=declared,
            config=_exported_config(carried, model),
            extra_files=carried_files(carried) if carried.is_dir() else (),
            workers=workers,
        )
    return Done(tensors=len(plans), nbytes=sum(d.nbytes for d in declared))


def checkpoint_model(directory: Path) -> ModelConfig:
    """The model that a checkpoint describes itself, in `mbfn.json` or `hf/config.json`.

    Raises: CheckpointError when it has neither.
    """
    found = read_manifest(directory).get("model")
    if found is not None:
        return build(ModelConfig, found)
    if (directory / HF_FOLDER / "config.json").exists():
        return model_from_hf(directory / HF_FOLDER)
    raise CheckpointError(
        f"{directory}: says nothing of its model; name a Hugging Face directory or config.json that does: config=DIR"
    )


def checkpoint_table(model: ModelConfig, source: TorchDistCheckpoint) -> Table:
    """The weight rules sized as the checkpoint is, every key and shape checked before any weight is read.

    Raises: ConversionError with one line for each tensor that is missing, unknown, or of another shape.
    """
    rows = source.meta(EMBEDDING).shape[0] if EMBEDDING in source else model.vocab_size
    table = table_padded(model, max(rows, model.vocab_size))
    wanted = checkpoint_shapes(table)
    lines = [f"{key}: missing; expected shape {list(shape)}" for key, shape in wanted.items() if key not in source]
    for key in source:
        found = tuple(source.meta(key).shape)
        if key in wanted and found != wanted[key]:
            lines.append(f"{key}: expected shape {list(wanted[key])}, found {list(found)}")
        if key not in wanted and not key.startswith(NOT_WEIGHTS):
            lines.append(f"{key}: no rule of family {model.family} for this key")
    if lines:
        raise ConversionError("\n".join(f"{source.path}: {line}" for line in lines[:8]))
    return table


def _exported_config(carried: Path, model: ModelConfig) -> Mapping[str, object]:
    """The config.json that came with the weights where it still describes them, else one made from the model."""
    file = carried / "config.json"
    if file.exists():
        config = read_json(file)
        if replace(model_from_hf(config), params_dtype=model.params_dtype) == model:
            return config
    return model_to_hf(model)


def _counted(read: Read, on_bytes: OnBytes | None) -> Read:
    if on_bytes is None:
        return read

    def counting(start: int, stop: int, out: Tensor) -> None:
        read(start, stop, out)
        on_bytes((stop - start) * out.itemsize)

    return counting
