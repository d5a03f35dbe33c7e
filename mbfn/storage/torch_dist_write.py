"""Megatron (torch_dist) checkpoints written without Megatron: the files that megatron-core 0.19 saves, streamed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.plans import checkpoint_place
from mbfn.convert.table import Table
from mbfn.storage.atomic import atomic_directory
from mbfn.storage.dist_metadata import BACKEND, COMMON, Placed, by_key, check_cover, metadata_bytes
from mbfn.storage.streams import Read, run_all, write_exactly, write_tensor
from mbfn.storage.zips import TensorArchive, tensor_archive

HF_FOLDER = "hf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A box of a global tensor, which rank `rank`'s file holds."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Tensor | Read
    rank: int = 0


def write_torch_dist(
    path: str | os.PathLike[str],
    chunks: Iterable[Chunk],
    *,
    objects: Mapping[str, Any] | None = None,
    common: Mapping[str, Any] | None = None,
    content_metadata: Mapping[str, Any] | None = None,
    model: ModelConfig | None = None,
    parallel: ParallelConfig | None = None,
    config: Mapping[str, Any] | None = None,
    extra_files: Iterable[Path] = (),
    workers: int = 2,
) -> None:
    """Write a checkpoint that `megatron.core.dist_checkpointing.load` reads, whole or not at all.

    `objects`: values that are no tensors, by unique key (`.../_extra_state/shard_0_4`). `config` and `extra_files`
    (the Hugging Face config.json and tokenizer) go to the folder `hf`, `model` and `parallel` into `mbfn.json`.
    Raises: CheckpointError when chunks do not cover a tensor, or the target cannot be written.
    """
    chunks = list(chunks)
    _check(chunks, Path(path))
    shared = {
        **(common or {}),
        **({"content_metadata": dict(content_metadata)} if content_metadata is not None else {}),
    }
    blobs = {COMMON: _saved(shared), **{key: _saved(value) for key, value in (objects or {}).items()}}
    archives = [tensor_archive(chunk.shape, chunk.dtype) for chunk in chunks]
    placed_blobs, placed = _place(blobs, chunks, archives)
    manifest = {"model": asdict(model) if model else None, "parallel": asdict(parallel) if parallel else None}
    nbytes = sum(place.length for place in (*placed_blobs, *placed))
    with atomic_directory(path, kind=BACKEND, manifest=manifest, nbytes=nbytes) as draft:
        with contextlib.ExitStack() as stack:
            fds = _create(draft, {place.file for place in (*placed_blobs, *placed)}, stack)
            for place, blob in zip(placed_blobs, blobs.values(), strict=True):
                write_exactly(fds[place.file], blob, place.position)
            jobs = (
                partial(_write_chunk, fds[place.file], place.position, chunk, archive)
                for place, chunk, archive in zip(placed, chunks, archives, strict=True)
            )
            run_all(jobs, workers)
        (draft / ".metadata").write_bytes(metadata_bytes(chunks, placed_blobs, placed))
        _carry(draft / HF_FOLDER, config, extra_files)
        text = json.dumps({"sharded_backend": BACKEND, "sharded_backend_version": 1})
        (draft / "metadata.json").write_text(text, encoding="utf-8")


def extra_states(table: Table) -> dict[str, None]:
    """The `_extra_state` objects that a GPTModel asks for, whether of local or Transformer Engine modules.

    They hold FP8 scales and are empty otherwise. Loading fails where one is missing and passes over those that the
    model does not have (at megatron-core's default strictness).
    """
    found: dict[str, None] = {}
    for tensor in table.tensors.values():
        key, shape, at = checkpoint_place(tensor, table)
        stacked = len(at) - len(tensor.shape)
        shard = f"{'.'.join(map(str, at[:stacked])) or 0}_{'.'.join(map(str, shape[:stacked])) or 1}"
        module = key.rpartition(".")[0]
        modules = [module] if module.rpartition(".")[2].endswith(("norm", "proj", "qkv", "fc1", "fc2")) else []
        if module.endswith("self_attention.linear_proj"):
            modules.append(module.replace("linear_proj", "core_attention"))
        found |= {f"{name}._extra_state/shard_{shard}": None for name in modules}
    return found


def _check(chunks: Sequence[Chunk], path: Path) -> None:
    for key, parts in by_key(chunks).items():
        if len({(part.global_shape, part.dtype) for part in parts}) > 1:
            raise ValueError(f"{key}: chunks of different global shapes or dtypes")
        check_cover(key, parts[0].global_shape, [(part.offset, part.shape) for part in parts], path)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()


def _place(
    blobs: Mapping[str, bytes], chunks: Sequence[Chunk], archives: Sequence[TensorArchive]
) -> tuple[list[Placed], list[Placed]]:
    """Places of objects (all in the first file) and chunks, known before anything is written."""
    ends: dict[str, int] = {}

    def place(key: str, offset: tuple[int, ...] | None, rank: int, length: int) -> Placed:
        file = f"__{rank}_0.distcp"
        position = ends.get(file, 0)
        ends[file] = position + length
        return Placed(key=key, offset=offset, file=file, position=position, length=length)

    first = min((chunk.rank for chunk in chunks), default=0)
    objects = [place(key, None, first, len(blob)) for key, blob in blobs.items()]
    pairs = zip(chunks, archives, strict=True)
    return objects, [place(chunk.key, chunk.offset, chunk.rank, archive.length) for chunk, archive in pairs]


def _create(draft: Path, files: Iterable[str], stack: contextlib.ExitStack) -> dict[str, int]:
    fds = {}
    for file in sorted(files):
        fds[file] = os.open(draft / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, fds[file])
    return fds


def _write_chunk(fd: int, position: int, chunk: Chunk, archive: TensorArchive) -> None:
    write_exactly(fd, archive.head, position)
    data_at = position + len(archive.head)
    crc = write_tensor(fd, data_at, chunk.shape, chunk.dtype, chunk.data)
    write_exactly(fd, archive.tail(crc), data_at + archive.nbytes)


def _carry(folder: Path, config: Mapping[str, Any] | None, extra_files: Iterable[Path]) -> None:
    files = list(extra_files)
    if config is None and not files:
        return
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
