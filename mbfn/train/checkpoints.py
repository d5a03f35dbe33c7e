"""The checkpoints of an output directory: which there are, whether one fits this run, when to write, which to drop."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbfn.config.diff import effect_of, flatten
from mbfn.config.run import RunConfig
from mbfn.config.train import CheckpointConfig
from mbfn.errors import CheckpointError

DIRECTORY = "checkpoints"  # in a run directory
_MANIFEST = "mbfn.json"
_NAME = re.compile(r"step_(\d{8,})")
_DROPPED = ".dropped_"
_FIXED = ("seed", "seq_length", "global_batch_size")  # of `train`: with another value the data order would differ


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint after update number `step` goes."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root` that are whole, oldest first."""
    return [path for path in _named(root) if not incomplete(path)]


def incomplete(path: Path) -> str:
    """Why a directory is not the checkpoint that was written: no manifest, a file gone or of another size; else empty.

    No data is read.
    """
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / _MANIFEST}: cannot be read: {error!r}"
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            return f"{path / name}: {error.strerror}"
        if found != size:
            return f"{path / name}: expected {size} bytes, found {found}"
    return "" if "metadata.json" in files else f"{path}: not a Megatron checkpoint"


def checkpoint_to_resume(run: RunConfig, root: Path) -> Path | None:
    """The last complete checkpoint under `root`, else the one that `checkpoint.resume` names; none for a fresh start.

    Raises: CheckpointError when there are some and `checkpoint.resume=never`, or where it names none.
    """
    found, wanted = complete_checkpoints(root), run.checkpoint.resume
    if found and wanted == "never":
        raise CheckpointError(
            f"checkpoint.resume: never, but {root} holds {found[-1].name}; choose another hydra.run.dir, remove it, or "
            "set checkpoint.resume=auto"
        )
    if found or wanted in ("auto", "never"):
        return found[-1] if found else None
    return _named_checkpoint(Path(wanted).expanduser())


def _named_checkpoint(path: Path) -> Path:
    """A checkpoint directory, of any Megatron-core program, or the last one of a run directory."""
    if (path / "metadata.json").is_file():
        fault = incomplete(path) if (path / _MANIFEST).exists() else ""
        if fault:
            raise CheckpointError(f"checkpoint.resume: {fault}; choose another checkpoint")
        return path
    found = complete_checkpoints(path / DIRECTORY) or complete_checkpoints(path)
    if not found:
        raise CheckpointError(f"checkpoint.resume: {path}: neither a Megatron checkpoint nor a run that has one")
    return found[-1]


def skipped_checkpoints(root: Path, resumed: Path | None) -> list[str]:
    """Why each checkpoint newer than the one to resume from is left alone."""
    newer = [
        path
        for path in _named(root)
        if resumed is None or step_of(path) > (step_of(resumed) if _NAME.fullmatch(resumed.name) else 0)
    ]
    return [fault for path in newer if (fault := incomplete(path))]


def run_record(run: RunConfig, data_digest: str, step: int, tokens: int) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it: plain values."""
    return {"step": step, "tokens": tokens, "data": data_digest, "run": asdict(run)}


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without reading it; empty where another program made it."""
    file = path / _MANIFEST
    return json.loads(file.read_text()) if file.is_file() else {}


def check_record(record: Mapping[str, Any], run: RunConfig, data_digest: str, path: Path) -> list[str]:
    """Refuse to continue another model, another data order or another text; a line for each other change of numerics.

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
    old, new = (dict(flatten(_plain(tree))) for tree in (record["run"], now["run"]))
    changed = [name for name in new if name in old and old[name] != new[name] and effect_of(name) == "numerics"]
    return [f"{name}: was {old[name]} up to here, is {new[name]} from now on" for name in changed]


def kept(found: Sequence[tuple[int, float | None]], config: CheckpointConfig) -> frozenset[int]:
    """Which of the checkpoints (step, held-out loss) stay: the last, those of `keep_every`, and the best."""
    steps = sorted(step for step, _ in found)
    stay = set(steps[-config.keep_last :])
    if config.keep_every:
        stay |= {step for step in steps if step % config.keep_every == 0}
    judged = sorted((loss, step) for step, loss in found if loss is not None and math.isfinite(loss))
    return frozenset(stay | {step for _, step in judged[: config.keep_best]})


def prune(root: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints that are not to be kept, and what an interrupted removal left.

    Renamed first, so that a half-removed one is never taken for whole.
    """
    complete = {step_of(path): path for path in complete_checkpoints(root)}
    losses = (
        {step: read_manifest(path).get("valid_loss") for step, path in complete.items()} if config.keep_best else {}
    )
    stay = kept([(step, losses.get(step)) for step in complete], config)
    for path in (path for step, path in complete.items() if step not in stay):
        os.replace(path, path.with_name(_DROPPED + path.name))
    for path in root.glob(f"{_DROPPED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _named(root: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, in the order of steps."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number of updates that a checkpoint holds, by its name."""
    return int(path.name.removeprefix("step_"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
