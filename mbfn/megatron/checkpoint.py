"""A training state on disk in Megatron's torch_dist format: whole or absent, and read by any layout."""

from __future__ import annotations

import os
import pickle
import queue
import shutil
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.filesystem_async as core_writer
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)

from mbfn.config.run import RunConfig
from mbfn.errors import CheckpointError
from mbfn.megatron.device import attributes
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.optimizer import Models, gathered
from mbfn.megatron.torch_adam import load_optimizer
from mbfn.megatron.world import World

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_COMMON = "mbfn"


def save(directory: str | Path, run: RunConfig, world: World, models: Models, common: dict[str, Any]) -> None:
    """Write weights, optimizer and `common` (plain values) to a new `directory`, which appears whole. Collective.

    Raises: CheckpointError when it cannot be written.
    """
    target = Path(directory)
    partial = target.parent / f".{target.name}.partial"
    _on_first_rank(world, lambda: _fresh(target, partial))
    with gathered(models):
        state = _sharded_state(world, models, is_loading=False) | {_COMMON: common}
        # Megatron starts a process to hand results from a background writer; nothing is in the background here.
        with attributes(core_writer, {"_results_queue": queue.Queue()}):
            dist_checkpointing.save(state, str(partial), TorchDistSaveShardedStrategy(), content_metadata={**_CONTENT})
    _on_first_rank(world, lambda: _publish(partial, target))


def load(directory: str | Path, run: RunConfig, world: World, models: Models) -> dict[str, Any]:
    """Set weights and optimizer from a checkpoint of any layout, and return its `common`. Collective.

    Raises: CheckpointError for a directory that is no checkpoint or not of this model.
    """
    source = Path(directory)
    if not (source / "metadata.json").is_file():
        raise CheckpointError(f"{source}: expected a Megatron checkpoint, found no metadata.json in it")
    try:
        found = dist_checkpointing.load(
            _sharded_state(world, models, is_loading=True), str(source), TorchDistLoadShardedStrategy()
        )
    except (CheckpointingException, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{source}: does not hold this model and optimizer: {_one_line(error)}") from error
    for key, chunk in _named(models).items():
        chunk.load_state_dict(found[key])
    load_optimizer(models.optimizer, found["optimizer"])
    return found[_COMMON]


def _sharded_state(world: World, models: Models, *, is_loading: bool) -> dict[str, Any]:
    metadata = _CONTENT | {"dp_cp_group": world.groups.dp_cp}
    state: dict[str, Any] = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named(models).items()}
    state["optimizer"] = models.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _named(models: Models) -> dict[str, LanguageModel]:
    if len(models.chunks) == 1:
        return {"model": models.chunks[0]}
    return {f"model{number}": chunk for number, chunk in enumerate(models.chunks)}


def _on_first_rank(world: World, action: Any) -> None:
    """Run `action` on rank 0 while the others wait; its failure is every rank's error."""
    failure: list[str | None] = [None]
    if world.rank == 0:
        try:
            action()
        except OSError as error:
            failure[0] = f"{error.filename or ''}: cannot write the checkpoint: {error.strerror or error}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def _fresh(target: Path, partial: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()


def _publish(partial: Path, target: Path) -> None:
    for path in (*partial.iterdir(), partial):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
