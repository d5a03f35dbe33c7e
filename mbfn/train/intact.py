"""Whether what a run starts from is what was written: checked before the first step, shared out over all ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mbfn.config.run import RunConfig
from mbfn.errors import CheckpointError
from mbfn.megatron import World
from mbfn.storage import file_jobs, read_manifest
from mbfn.storage.parts import crc_of
from mbfn.storage.streams import run_all

_THREADS = 2


def check_sources(run: RunConfig, world: World, resume: Path | None) -> dict[str, Any]:
    """Check the checkpoint or the Hugging Face directory that the run starts from; its digests, by file. Collective.

    A directory that another program wrote notes no digests: then these are those of its bytes now.

    Raises: CheckpointError on every rank, naming the first file that is not as it was written.
    """
    source = resume or (None if run.init.hf is None else Path(run.init.hf).expanduser())
    if source is None:
        return {}
    digests = run.checkpoint.verify == "digests"
    if digests:
        check_intact(source, world)
    noted = read_manifest(source).get("crc32")
    found = noted or (_file_digests(source, world) if digests else {})
    return {str(source): found}


def check_intact(path: Path, world: World) -> None:
    """Compare every byte whose digest is noted. Collective.

    Raises: CheckpointError on every rank, naming the first file that changed.
    """
    jobs = file_jobs(path)[world.rank :: world.world_size]
    faults = [fault for fault in run_all(jobs, _THREADS) if fault]
    found = [fault for part in _gathered(faults, world) for fault in part]
    if found:
        others = f" ({len(found)} such)" if len(found) > 1 else ""
        raise CheckpointError(f"{found[0]}{others}; checkpoint.verify=sizes starts all the same")


def _file_digests(directory: Path, world: World) -> dict[str, int]:
    """The CRC-32 of each file of weights. Collective."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.distcp")])
    mine = files[world.rank :: world.world_size]
    sums = run_all((partial(_crc, file) for file in mine), _THREADS)
    own = {file.name: crc for file, crc in zip(mine, sums, strict=True)}
    return {name: crc for part in _gathered(own, world) for name, crc in part.items()}


def _crc(file: Path) -> int:
    with file.open("rb", buffering=0) as stream:
        return crc_of(stream.fileno(), 0, file.stat().st_size, file)


def _gathered(own: Any, world: World) -> list[Any]:
    parts: list[Any] = [own]
    if world.world_size > 1:
        parts = [None] * world.world_size
        dist.all_gather_object(parts, own)
    return parts
