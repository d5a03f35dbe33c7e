"""A Megatron (torch_dist) checkpoint as a lazy mapping of global tensors: no Megatron, process group or GPU.

Layers of one kind are stacked: `decoder.layers.mlp.linear_fc2.weight` has a leading axis of layers. What the directory
holds: `.metadata` (tensors, their chunks, where each lies), `__R_0.distcp` (each chunk one torch.save archive).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mbfn.convert.copies import Copy, contiguous_strides, window
from mbfn.errors import CheckpointError
from mbfn.storage.dist_metadata import BACKEND, COMMON, ChunkMeta, GlobalMeta, read_metadata
from mbfn.storage.hf import read_json
from mbfn.storage.regions import TensorMeta, read_region, span
from mbfn.storage.saved import Stored, read_value
from mbfn.storage.zips import Entry, read_archive


class TorchDistCheckpoint(Mapping[str, Tensor]):
    """The global tensors of `path` by key, a `RegionSource`; `objects` are its other values, read when asked for."""

    def __init__(self, path: Path, metas: Mapping[str, GlobalMeta], objects: Mapping[str, ChunkMeta]) -> None:
        self.path = path
        self.metas = MappingProxyType(dict(metas))
        self.objects = MappingProxyType(dict(objects))
        self._fds: dict[Path, int] = {}
        self._archives: dict[ChunkMeta, TensorMeta] = {}
        self._lock = threading.Lock()
        self._ranges = {key: _flat_ranges(meta) for key, meta in metas.items()}
        self._finalizer = weakref.finalize(self, _close, self._fds)
        try:
            for file in {chunk.file for meta in metas.values() for chunk in meta.chunks}:
                self._fd(file)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, key: str) -> Tensor:
        """Read one whole global tensor."""
        meta = self.metas[key]
        out = torch.empty(meta.shape, dtype=meta.dtype)
        strides = tuple(math.prod(meta.shape[axis + 1 :]) for axis in range(len(meta.shape)))
        self.read_into(Copy(key, meta.shape, 0, strides, 0, strides), out)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)

    def __contains__(self, key: object) -> bool:
        return key in self.metas

    def meta(self, key: str) -> GlobalMeta:
        """Shape, dtype and chunks of a global tensor, without reading it."""
        return self.metas[key]

    def read_into(self, copy: Copy, out: Tensor) -> None:
        """Carry out `copy` from the global tensor `copy.source` into the contiguous `out`, reading only its bytes."""
        meta = self.metas[copy.source]
        for chunk, part in self.parts(copy):
            stored = self._stored(copy.source, chunk, meta.dtype)
            read_region(self._fd(chunk.file), stored, part, out)

    def parts(self, copy: Copy) -> Iterator[tuple[ChunkMeta, Copy]]:
        """`copy` chunk by chunk, its source then the chunk."""
        meta = self.metas[copy.source]
        if copy.numel == 0:
            return
        last = copy.src_offset + span(copy.shape, copy.src_strides) - 1
        if copy.src_offset < 0 or last >= math.prod(meta.shape):
            raise ValueError(f"{copy}: leaves its source of shape {meta.shape}")
        firsts, lasts = self._ranges[copy.source]
        for index in np.flatnonzero((firsts <= last) & (lasts >= copy.src_offset)):
            chunk = meta.chunks[index]
            end = tuple(a + b for a, b in zip(chunk.offset, chunk.shape, strict=True))
            yield from ((chunk, part) for part in window(copy, "src", meta.shape, chunk.offset, end))

    def load_object(self, key: str) -> Any:
        """A value that is no tensor, by its key (`.../shard_0_1`). Objects of unknown classes come as `Record`s."""
        chunk = self.objects[key]
        fd = self._fd(chunk.file)
        found = read_value(fd, read_archive(fd, chunk.position, chunk.length, chunk.file), chunk.file)
        return found[0] if isinstance(found, list) and len(found) == 1 else found

    def common(self) -> dict[str, Any]:
        """What every rank shares: arguments, step, content metadata."""
        legacy = self.path / "common.pt"  # megatron-core before 0.19
        if COMMON in self.objects:
            found = self.load_object(COMMON)
        elif legacy.exists():
            fd = self._fd(legacy)
            found = read_value(fd, read_archive(fd, 0, os.fstat(fd).st_size, legacy), legacy)
        else:
            return {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path}: expected the common state to be a dict, found {type(found).__name__}")
        return found

    def archive(self, key: str, chunk: ChunkMeta) -> Entry:
        """Where the bytes of a chunk lie, and the CRC-32 that was noted when they were written."""
        return read_archive(self._fd(chunk.file), chunk.position, chunk.length, chunk.file)["data/0"]

    def close(self) -> None:
        """Close the files; also done when the last reference goes."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TorchDistCheckpoint({str(self.path)!r}, {len(self)} tensors, {len(self.objects)} objects)"

    def _fd(self, file: Path) -> int:
        with self._lock:
            if not self._finalizer.alive:
                raise ValueError(f"{self.path}: read after close()")
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be opened: {error.strerror}; copy it again") from None
            return self._fds[file]

    def _stored(self, key: str, chunk: ChunkMeta, dtype: torch.dtype) -> TensorMeta:
        """Where the elements of a chunk lie; what the archive says of them is checked once."""
        if chunk not in self._archives:
            fd = self._fd(chunk.file)
            entries = read_archive(fd, chunk.position, chunk.length, chunk.file)
            found = read_value(fd, entries, chunk.file, tensors=False)
            nbytes = math.prod(chunk.shape) * dtype.itemsize
            if found != Stored(chunk.shape, dtype) or entries.get("data/0") is None:
                raise CheckpointError(
                    f"{chunk.file}: {key} at {chunk.offset}: expected a contiguous {dtype} of shape {chunk.shape}, "
                    f"found {found}; the .metadata is of another checkpoint"
                )
            place = entries["data/0"]
            if place.nbytes != nbytes:
                raise CheckpointError(f"{chunk.file}: {key}: expected {nbytes} bytes of data, found {place.nbytes}")
            self._archives[chunk] = TensorMeta(
                shape=chunk.shape, dtype=dtype, file=chunk.file, offset=place.position, nbytes=nbytes
            )
        return self._archives[chunk]


def open_torch_dist(path: str | os.PathLike[str]) -> TorchDistCheckpoint:
    """Open a checkpoint directory lazily: its `.metadata` is read, no weights.

    Raises: CheckpointError when it is no torch_dist checkpoint, or its chunks do not cover its tensors.
    """
    root = Path(path).expanduser()
    config = root / "metadata.json"
    if not config.exists():
        raise CheckpointError(
            f"{root}: no metadata.json, so no finished Megatron checkpoint; expected a torch_dist one"
        )
    backend = read_json(config).get("sharded_backend")
    if backend != BACKEND:
        raise CheckpointError(f"{config}: expected sharded_backend {BACKEND!r}, found {backend!r}")
    return TorchDistCheckpoint(root, *read_metadata(root))


def _flat_ranges(meta: GlobalMeta) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of every chunk's first and last element in its tensor."""
    strides = np.array(contiguous_strides(meta.shape), dtype=np.int64)
    count = len(meta.chunks), len(meta.shape)
    firsts = np.array([chunk.offset for chunk in meta.chunks], dtype=np.int64).reshape(count)
    sizes = np.array([chunk.shape for chunk in meta.chunks], dtype=np.int64).reshape(count)
    return firsts @ strides, (firsts + sizes - 1) @ strides


def _close(fds: dict[Path, int]) -> None:
    for fd in fds.values():
        with contextlib.suppress(OSError):
            os.close(fd)
