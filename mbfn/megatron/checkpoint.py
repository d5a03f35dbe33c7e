"""A training state on disk in Megatron's torch_dist format: whole or absent, and read by any layout."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from mbfn.config.run import RunConfig
from mbfn.errors import CheckpointError
from mbfn.megatron.adapt import MARK
from mbfn.megatron.cut_state import sharded_weights, without_cut
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.optimizer import Models, gathered, spread_weights
from mbfn.megatron.optimizer_state import before_update, exact_states, load_optimizer
from mbfn.megatron.reader import ParallelReader
from mbfn.megatron.saver import Saver, nothing
from mbfn.megatron.sharded import held
from mbfn.megatron.world import World

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_COMMON = "mbfn"
Keep = Callable[[str], bool]
"""Which weights a checkpoint is about, by their keys in it."""
_FAULTS = (CheckpointingException, CheckpointException, OSError, EOFError, KeyError, ValueError, RuntimeError)


def all_keys(_: str) -> bool:
    """The whole model."""
    return True


def trained_keys(run: RunConfig) -> Keep:
    """What a checkpoint of `run` holds: adapters alone where weights are frozen."""
    if run.peft.kind == "none":
        return all_keys
    history = run.precision.fp8 == "delayed"  # which the next step depends on
    return lambda key: MARK in key or (history and key.endswith("_extra_state"))


def save(
    directory: str | Path,
    run: RunConfig,
    world: World,
    models: Models,
    common: Mapping[str, Any],
    *,
    keep: Keep | None = None,
) -> None:
    """Write weights, optimizer and `common` (plain values) to `directory`, which appears whole. Collective.

    `keep`: which weights; none: those that the run trains, all of them or its adapters.
    Raises: CheckpointError when it cannot be written.
    """
    saver = Saver(world)
    begin_save(saver, directory, run, world, models, common, keep=keep, background=False)
    if error := saver.finish():
        raise CheckpointError(error)


def begin_save(
    saver: Saver,
    directory: str | Path,
    run: RunConfig,
    world: World,
    models: Models,
    common: Mapping[str, Any],
    *,
    record: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
    background: bool = True,
    then: Callable[[], None] = nothing,
) -> None:
    """Start to write what `save` writes; `record` goes into the manifest too. Collective.

    When the checkpoint stands in its place, rank 0's writing thread calls `then`.

    In the background a copy is written, and an update that comes before the copy is whole waits for it: nothing else
    may change weights or optimizer meanwhile. Else both stay as they are until `saver.finish()`.

    Raises: CheckpointError where the save before this one failed.
    """
    manifest = {"model": asdict(run.model), "parallel": asdict(run.parallel), **(record or {})}
    with gathered(models), _clear_faults(Path(directory), "cannot write"):
        state = _model_state(world, models.chunks, keep or trained_keys(run))
        state |= {"optimizer": _optimizer_state(world, models, state, is_loading=False)}
        whole = held(state | {_COMMON: dict(common), "content_metadata": dict(_CONTENT)})
    buffers = {buffer.data_ptr() for chunk in models.chunks for buffer in chunk.buffers()}
    changing = (lambda data: data.data_ptr() in buffers) if background else None
    staged = saver.begin(Path(directory), whole, manifest, changing=changing, then=then)
    if staged is not None:
        before_update(models.optimizer, lambda: saver.hold(staged))


def load(
    directory: str | Path, run: RunConfig, world: World, models: Models, *, keep: Keep | None = None
) -> dict[str, Any]:
    """Set weights and optimizer from a checkpoint of any layout, and return its `common`. Collective.

    A checkpoint of another program has no `common`; then it is `{"iteration": ...}`, where that is known.

    Raises: CheckpointError for a directory that is no checkpoint, or not of this model and optimizer.
    """
    keep = keep or trained_keys(run)
    with gathered(models):
        state = _model_state(world, models.chunks, keep)
        state["optimizer"] = _optimizer_state(world, models, state, is_loading=True)
        found = _read(Path(directory), state, world)
        _set_weights(models.chunks, found, strict=keep is all_keys)
        with _clear_faults(Path(directory), "not of this optimizer"):
            load_optimizer(models.optimizer, found["optimizer"])
        spread_weights(models)
    return found.get(_COMMON, {"iteration": found.get("iteration", 0)})


def load_model(directory: str | Path, world: World, chunks: Sequence[LanguageModel], *, keep: Keep = all_keys) -> None:
    """Set weights alone from a checkpoint of any layout, with or without an optimizer in it. Collective.

    Raises: CheckpointError for a directory that is no checkpoint, or not of this model.
    """
    found = _read(Path(directory), _model_state(world, chunks, keep), world)
    _set_weights(chunks, found, strict=keep is all_keys)


def _model_state(world: World, chunks: Sequence[LanguageModel], keep: Keep) -> dict[str, Any]:
    # Not every layer need have what is kept, so that no tensor holds all layers.
    metadata = _CONTENT | {"dp_cp_group": world.groups.dp_cp, "non_homogeneous_layers": keep is not all_keys}
    whole = {key: sharded_weights(chunk, metadata) for key, chunk in _named(chunks).items()}
    return {
        key: {name: entry for name, entry in state.items() if keep(_key(entry, name))} for key, state in whole.items()
    }


def _key(entry: Any, name: str) -> str:
    """A weight's key in the checkpoint; one of which the rank has no part has its own name."""
    if isinstance(entry, dict):
        return entry["boxes"][0].key if "boxes" in entry else name
    return getattr(entry, "key", name)


def _optimizer_state(world: World, models: Models, state: dict[str, Any], *, is_loading: bool) -> Any:
    metadata = _CONTENT | {"dp_cp_group": world.groups.dp_cp}
    with exact_states(models.optimizer):
        return models.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)


def _named(chunks: Sequence[LanguageModel]) -> dict[str, LanguageModel]:
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _set_weights(chunks: Sequence[LanguageModel], found: Mapping[str, Any], *, strict: bool) -> None:
    # Transformer Engine keeps the scaling history of delayed FP8 as a pickle, which it asks leave to read. A checkpoint
    # is trusted as a whole: Megatron reads its common state as a pickle too.
    with _environment("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1"):
        for key, chunk in _named(chunks).items():
            left = without_cut(found[key])
            chunk.load_state_dict(left, strict=strict and len(left) == len(found[key]))


def _read(source: Path, state: dict[str, Any], world: World) -> dict[str, Any]:
    if not (source / "metadata.json").is_file():
        raise CheckpointError(f"{source}: expected a Megatron checkpoint, found no metadata.json in it")
    with _clear_faults(source, "broken, or not of this model and optimizer"):
        reader: Any = ParallelReader(world.groups.dp_cp)
        return dist_checkpointing.load(state, str(source), reader, validate_access_integrity=False)


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
