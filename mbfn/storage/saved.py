"""What torch.save wrote: a value, or only the description of its tensor; no code that it names runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbfn.errors import CheckpointError
from mbfn.storage.pickles import STORAGES, Global, loads
from mbfn.storage.zips import Entry

DTYPES = {name: dtype for dtype, name in STORAGES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of an archive, by its description; contiguous and from the start of its storage."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}" if self.dtype else f"a strided tensor of shape {self.shape}"


def read_value(fd: int, entries: Mapping[str, Entry], file: Path, *, tensors: bool = True) -> Any:
    """The value of an archive; its tensors described as `Stored`, or read where `tensors`."""
    if "data.pkl" not in entries:
        raise CheckpointError(f"{file}: an archive without data.pkl; expected what torch.save writes")
    place = entries["data.pkl"]
    rebuild = partial(_rebuild, fd, entries, file) if tensors else _describe
    known = {Global("torch._utils", f"_rebuild_tensor_{kind}"): rebuild for kind in ("v2", "v3")}
    known[Global("torch._utils", "_rebuild_parameter")] = lambda data, *_: data
    return loads(os.pread(fd, place.nbytes, place.position), file, known=known)


def _describe(storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any) -> Stored:
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    same = all(a == b for a, b, n in zip(strides, contiguous, shape, strict=True) if n > 1) or not math.prod(shape)
    return Stored(tuple(shape), _dtype_of(storage, rest) if same and offset == 0 else None)


def _dtype_of(storage: Any, rest: tuple[Any, ...]) -> torch.dtype:
    """From the rebuild's own argument where it has one, else from the name of the storage's class."""
    given = next((value for value in rest if isinstance(value, torch.dtype)), None)
    return given or DTYPES[storage[1].pickled.name]


def _rebuild(
    fd: int, entries: Mapping[str, Entry], file: Path, storage: Any, offset: int, shape: Any, strides: Any, *rest: Any
) -> Tensor:
    """A tensor inside an object: small, so read with its storage."""
    place = entries[f"data/{storage[2]}"]
    data = bytearray(os.pread(fd, place.nbytes, place.position))
    if not data:
        return torch.empty(tuple(shape), dtype=_dtype_of(storage, rest))
    return torch.frombuffer(data, dtype=torch.uint8).view(_dtype_of(storage, rest)).as_strided(shape, strides, offset)
