"""A training state on disk in Megatron's torch_dist format: whole or absent, and read by any layout."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
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
from torch.distributed.checkpoint.api import CheckpointException

from mbfn.config.run import RunConfig
from mbfn.errors import CheckpointError
from mbfn.megatron.device import attributes
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.optimizer import Models, gathered
from mbfn.megatron.optimizer_state import exact_states, load_optimizer
from mbfn.megatron.settings import DTYPES
from mbfn.megatron.world import World
from mbfn.storage.atomic import atomic_directory

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_COMMON = "mbfn"
_FAULTS = (CheckpointingException, CheckpointException, OSError, EOFError, KeyError, ValueError, RuntimeError)


def save(directory: str | Path, run: RunConfig, world: World, models: Models, common: Mapping[str, Any]) -> None:
    """Write weights, optimizer and `common` (plain values) to `directory`, which appears whole. Collective.

    Raises: CheckpointError when it cannot be written.
    """
    target = Path(directory)
    manifest = {"model": asdict(run.model), "parallel": asdict(run.parallel)}
    shared = _shared_directory(target, manifest, world, _size(run))
    with gathered(models), shared as draft, _clear_faults(target, "cannot write"):
        state = _model_state(world, models.chunks)
        state |= {"optimizer": _optimizer_state(world, models, state, is_loading=False), _COMMON: dict(common)}
        # Megatron starts a process to hand results from a background writer; nothing is in the background here.
        with attributes(core_writer, {"_results_queue": queue.Queue()}):
            dist_checkpointing.save(state, draft, TorchDistSaveShardedStrategy(), content_metadata=dict(_CONTENT))


def load(directory: str | Path, run: RunConfig, world: World, models: Models) -> dict[str, Any]:
    """Set weights and optimizer from a checkpoint of any layout, and return its `common`. Collective.

    Raises: CheckpointError for a directory that is no checkpoint, or not of this model and optimizer.
    """
    del run
    state = _model_state(world, models.chunks)
    state["optimizer"] = _optimizer_state(world, models, state, is_loading=True)
    found = _read(Path(directory), state)
    _set_weights(models.chunks, found)
    with _clear_faults(Path(directory), "not of this optimizer"):
        load_optimizer(models.optimizer, found["optimizer"])
    return found[_COMMON]


def load_model(directory: str | Path, world: World, chunks: Sequence[LanguageModel]) -> None:
    """Set weights alone from a checkpoint of any layout, with or without an optimizer in it. Collective.

    Raises: CheckpointError for a directory that is no checkpoint, or not of this model.
    """
    _set_weights(chunks, _read(Path(directory), _model_state(world, chunks)))


def _model_state(world: World, chunks: Sequence[LanguageModel]) -> dict[str, Any]:
    metadata = _CONTENT | {"dp_cp_group": world.groups.dp_cp}
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named(chunks).items()}


def _optimizer_state(world: World, models: Models, state: dict[str, Any], *, is_loading: bool) -> Any:
    metadata = _CONTENT | {"dp_cp_group": world.groups.dp_cp}
    with exact_states(models.optimizer):
        return models.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)


def _named(chunks: Sequence[LanguageModel]) -> dict[str, LanguageModel]:
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _set_weights(chunks: Sequence[LanguageModel], found: Mapping[str, Any]) -> None:
    # Transformer Engine keeps the scaling history of delayed FP8 as a pickle, which it asks leave to read. A checkpoint
    # is trusted as a whole: Megatron reads its common state as a pickle too.
    with _environment("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1"):
        for key, chunk in _named(chunks).items():
            chunk.load_state_dict(found[key])


def _read(source: Path, state: dict[str, Any]) -> dict[str, Any]:
    if not (source / "metadata.json").is_file():
        raise CheckpointError(f"{source}: expected a Megatron checkpoint, found no metadata.json in it")
    with _clear_faults(source, "broken, or not of this model and optimizer"):
        return dist_checkpointing.load(state, str(source), TorchDistLoadShardedStrategy())


@contextlib.contextmanager
def _shared_directory(target: Path, manifest: Mapping[str, Any], world: World, nbytes: int) -> Iterator[str]:
    """One atomic directory that all ranks fill; rank 0 opens it and puts it in place."""
    with contextlib.ExitStack() as stack:
        opened = atomic_directory(target, kind="torch_dist", manifest=manifest, nbytes=nbytes)
        yield _on_first_rank(world, lambda: str(stack.enter_context(opened)))
        dist.barrier()
        _on_first_rank(world, stack.close)


def _on_first_rank(world: World, action: Callable[[], Any]) -> Any:
    """The result of `action` on rank 0, on every rank; its failure is every rank's error."""
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = action()
        except CheckpointError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _clear_faults(path: Path, what: str) -> Iterator[None]:
    """Megatron's and torch's many ways to fail, as one line about `path`."""
    try:
        yield
    except (*_FAULTS, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The system's own words, where an error of several ranks holds them."""
    text = " ".join(str(error).split())
    system = re.search(r"\[Errno \d+\] [\w ]+", text)
    if system:
        return system[0].strip()
    if isinstance(error, CheckpointException):
        return "a rank failed at its part of it (a full disk, a quota, a broken file; its log names the cause)"
    return text[:300]


def _size(run: RunConfig) -> int:
    """Bytes of a checkpoint: the weights, and the optimizer's three fp32 states of each."""
    return run.model.num_parameters * (DTYPES[run.precision.params].itemsize + 12)
