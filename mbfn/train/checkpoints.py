"""The checkpoints of an output directory: which there are, whether one fits this run, when to write, which to drop."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbfn.config.run import RunConfig
from mbfn.errors import CheckpointError

_NAME = re.compile(r"step_(\d{8,})")
_DROPPED = ".dropped_"
_FIXED = ("seed", "seq_length", "global_batch_size")  # of `train`: with another value the data order would differ


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint after update number `step` goes."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first. They appear by renaming, so whatever has the name is whole."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(run: RunConfig, root: Path) -> Path | None:
    """The last complete checkpoint, where the run may go on from it.

    Raises: CheckpointError when there are some and `checkpoint.resume=never`.
    """
    found = complete_checkpoints(root)
    if found and run.checkpoint.resume == "never":
        raise CheckpointError(
            f"checkpoint.resume: never, but {root} holds {found[-1].name}; choose another hydra.run.dir, remove it, or "
            "set checkpoint.resume=auto"
        )
    return found[-1] if found else None


def run_record(run: RunConfig, data_digest: str, step: int, tokens: int) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it: plain values."""
    return {"step": step, "tokens": tokens, "data": data_digest, "run": asdict(run)}


def check_record(record: Mapping[str, Any], run: RunConfig, data_digest: str, path: Path) -> None:
    """Refuse to continue another model, another data order or another text.

    Raises: CheckpointError naming the first field that differs.
    """
    now = run_record(run, data_digest, 0, 0)
    pairs = [("data", record["data"], now["data"])]
    pairs += [(f"model.{key}", record["run"]["model"].get(key), value) for key, value in now["run"]["model"].items()]
    pairs += [(f"train.{key}", record["run"]["train"][key], now["run"]["train"][key]) for key in _FIXED]
    for name, before, after in pairs:
        if _plain(before) != _plain(after):
            raise CheckpointError(
                f"{name}: {path} was made with {before}, this run has {after}; "
                "set it back, or choose another hydra.run.dir"
            )


def prune(root: Path, keep_last: int) -> None:
    """Remove all but the last checkpoints, and what an interrupted removal left.

    Renamed first, so that a half-removed one is never taken for whole.
    """
    for path in complete_checkpoints(root)[:-keep_last]:
        os.replace(path, path.with_name(_DROPPED + path.name))
    for path in root.glob(f"{_DROPPED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
