"""The safetensors format: a length, a JSON header, the tensors' bytes. Parsed and made here, because headers lie.

Source: https://github.com/huggingface/safetensors#format. Every rule of the format is checked before a byte is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mbfn.errors import CheckpointError
from mbfn.storage.regions import TensorMeta, pread_exactly

MAX_HEADER = 100_000_000  # the format's own limit
_METADATA = "__metadata__"
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def read_header(fd: int, path: Path) -> dict[str, TensorMeta]:
    """Every tensor of an open safetensors file, in the order of its bytes.

    Raises: CheckpointError when the file is cut, is not safetensors, or its header breaks a rule of the format.
    """
    size = os.fstat(fd).st_size
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; fetch or export it again")
    length = int.from_bytes(pread_exactly(fd, 8, 0, path), "little")
    if length > min(MAX_HEADER, size - 8):
        start = pread_exactly(fd, min(size, 64), 0, path)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its directory")
        raise CheckpointError(f"{path}: header of {length} bytes in a file of {size}: cut short or not safetensors")
    header = _parse_json(pread_exactly(fd, length, 8, path), path)
    header.pop(_METADATA, None)
    metas = [_tensor_meta(name, entry, 8 + length, path) for name, entry in header.items()]
    metas.sort(key=lambda pair: (pair[1].offset, pair[1].nbytes))
    _check_layout(metas, 8 + length, size, path)
    return dict(metas)


def make_header(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str], *, room: int = 0
) -> bytes:
    """The first bytes of a file that holds `tensors` in this order; padded to `room` bytes, else to the next 8.

    Raises: CheckpointError for a name or dtype that the format has no place for, or a name given twice.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, shape, dtype in tensors:
        if name == _METADATA or name in header:
            raise CheckpointError(f"{name}: {'the format keeps this name' if name == _METADATA else 'declared twice'}")
        if dtype not in NAMES:
            raise CheckpointError(f"{name}: safetensors has no dtype {dtype}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (room - 8 - len(text) if room else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not valid JSON ({error}); fetch or export the file again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object of tensors")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _tensor_meta(name: str, entry: Any, start: int, path: Path) -> tuple[str, TensorMeta]:
    """One entry of the header, checked by itself."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: {name}: expected dtype, shape and two data_offsets, found {entry}") from None
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"{path}: {name}: expected sizes and offsets of at least 0, found {entry}")
    if dtype_name not in DTYPES:
        raise CheckpointError(f"{path}: {name}: unknown dtype {dtype_name!r}; known: {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: {name}: {dtype_name} of shape {tuple(shape)} takes {nbytes} bytes, its header gives {end - begin}"
        )
    return name, TensorMeta(shape=tuple(shape), dtype=dtype, file=path, offset=start + begin, nbytes=nbytes)


def _check_layout(metas: list[tuple[str, TensorMeta]], start: int, size: int, path: Path) -> None:
    """The format allows no hole, no overlap, and nothing after the last tensor."""
    position = start
    for name, meta in metas:
        if meta.offset != position:
            fault = "overlaps the tensor before it" if meta.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name}: starts at byte {meta.offset}, expected {position}: it {fault}")
        position += meta.nbytes
    if position != size:
        fault = "is cut short" if size < position else "has bytes that no tensor owns"
        raise CheckpointError(f"{path}: the header describes {position} bytes, the file has {size}: it {fault}")
