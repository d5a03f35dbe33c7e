"""The `.metadata` of a torch_dist checkpoint, read and written without importing torch.distributed.checkpoint."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mbfn.errors import CheckpointError
from mbfn.storage.pickles import Call, Global, Instance, Pairs, Record, dumps, loads

COMMON = "common_state/shard_0_1"
BACKEND = "torch_dist"
METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMeta:
    """A box of a global tensor, and the archive that holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    position: int  # of the archive in the file
    length: int  # of the archive


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalMeta:
    """A global tensor and its chunks, which cover it exactly once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[ChunkMeta, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A chunk or an object at its place in a file."""

    key: str
    offset: tuple[int, ...] | None  # none: an object
    file: str
    position: int
    length: int


class Box(Protocol):
    """A chunk to be written."""

    @property
    def key(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def by_key[B: Box](chunks: Iterable[B]) -> dict[str, list[B]]:
    """Chunks of each global tensor."""
    found: dict[str, list[B]] = {}
    for chunk in chunks:
        found.setdefault(chunk.key, []).append(chunk)
    return found


def read_metadata(root: Path) -> tuple[dict[str, GlobalMeta], dict[str, ChunkMeta]]:
    """Tensors and objects of the checkpoint directory `root`, by key.

    Raises: CheckpointError when it is missing, broken, or its chunks do not cover a tensor.
    """
    file = root / ".metadata"
    try:
        found = loads(file.read_bytes(), file)
        places = {(i.fqn, getattr(i, "offset", None)): info for i, info in found.storage_data.items()}
        metas: dict[str, GlobalMeta] = {}
        objects: dict[str, ChunkMeta] = {}
        for key, entry in found.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                objects[key] = _chunk(root, (), (), places[key, None])
                continue
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            check_cover(key, tuple(entry.size), boxes, file)
            chunks = tuple(_chunk(root, offset, shape, places[key, offset]) for offset, shape in boxes)
            metas[key] = GlobalMeta(shape=tuple(entry.size), dtype=entry.properties.state[0], chunks=chunks)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; the checkpoint is not complete") from None
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{file}: not the metadata of a torch_dist checkpoint: {error!r}") from None
    return metas, objects


def _chunk(root: Path, offset: tuple[int, ...], shape: tuple[int, ...], info: Record) -> ChunkMeta:
    name: str = info.relative_path  # type: ignore[attr-defined]
    if Path(name).name != name:
        raise CheckpointError(f"{root / '.metadata'}: names a file outside the checkpoint: {name}")
    position, length = info.offset, info.length  # type: ignore[attr-defined]
    return ChunkMeta(offset=offset, shape=shape, file=root / name, position=position, length=length)


def metadata_bytes(chunks: Sequence[Box], objects: Sequence[Placed], placed: Sequence[Placed]) -> bytes:
    """The content of `.metadata` for chunks and objects at their places."""
    entries: dict[str, Instance] = {
        place.key: Instance(Global(METADATA, "BytesStorageMetadata"), {}) for place in objects
    }
    entries.update({key: _tensor_metadata(parts) for key, parts in by_key(chunks).items()})
    state = {
        "state_dict_metadata": entries,
        "planner_data": None,
        "storage_data": Pairs(tuple((_index(place), _info(place)) for place in (*objects, *placed))),
        "storage_meta": Instance(
            Global(METADATA, "StorageMeta"),
            {"checkpoint_id": None, "save_id": str(uuid.uuid4()), "load_id": None, "modules": []},
        ),
        "version": "1.0.0",
    }
    return dumps(Instance(Global(METADATA, "Metadata"), state))


def _size(shape: tuple[int, ...]) -> Call:
    """A torch.Size."""
    return Call(Global("torch", "Size"), (shape,))


def _tensor_metadata(parts: Sequence[Box]) -> Instance:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    dtype = Global("torch", str(parts[0].dtype).removeprefix("torch."))
    properties = Instance(Global(METADATA, "TensorProperties"), (dtype, layout, False, contiguous, False))
    boxes = [
        Instance(Global(METADATA, "ChunkStorageMetadata"), {"offsets": _size(part.offset), "sizes": _size(part.shape)})
        for part in parts
    ]
    state = {"properties": properties, "size": _size(parts[0].global_shape), "chunks": boxes}
    return Instance(Global(METADATA, "TensorStorageMetadata"), state)


def _index(place: Placed) -> Instance:
    offset = None if place.offset is None else _size(place.offset)
    return Instance(Global(METADATA, "MetadataIndex"), {"fqn": place.key, "index": None, "offset": offset})


def _info(place: Placed) -> Instance:
    state = {"relative_path": place.file, "offset": place.position, "length": place.length}
    return Instance(Global(FILESYSTEM, "_StorageInfo"), state)


def check_cover(
    key: str, shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]], path: Path
) -> None:
    """That boxes (offset, shape) cover a tensor exactly once.

    Raises: CheckpointError that names the tensor.
    """
    fits = all(
        len(offset) == len(size) == len(shape)
        and all(a >= 0 and b > 0 and a + b <= n for a, b, n in zip(offset, size, shape, strict=True))
        for offset, size in chunks
    )
    if not fits and _numel(shape):
        raise CheckpointError(f"{path}: {key}: a chunk leaves the tensor of shape {shape}; save the checkpoint again")
    total = sum(_numel(size) for _, size in chunks)
    if total != math.prod(shape):
        raise CheckpointError(
            f"{path}: {key}: chunks hold {total} elements, the tensor of shape {shape} has {math.prod(shape)}"
        )
    if _overlap(chunks):
        raise CheckpointError(f"{path}: {key}: chunks overlap, so others are missing; save the checkpoint again")


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _overlap(chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether two boxes share an element."""
    if len(chunks) < 2 or not chunks[0][0]:
        return len(chunks) > 1
    starts = np.array([offset for offset, _ in chunks])
    stops = starts + np.array([size for _, size in chunks])
    order = np.lexsort(starts.T[::-1])
    starts, stops = starts[order], stops[order]
    for index in range(len(starts) - 1):
        rest = slice(index + 1, int(np.searchsorted(starts[:, 0], stops[index, 0])))
        if bool(((starts[rest] < stops[index]) & (starts[index] < stops[rest])).all(axis=1).any()):
            return True
    return False
