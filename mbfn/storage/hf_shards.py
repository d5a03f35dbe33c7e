"""Where each tensor of an export goes: files and offsets, planned beforehand or found as the tensors come."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mbfn.errors import ConversionError
from mbfn.storage.headers import make_header
from mbfn.storage.hf import SINGLE
from mbfn.storage.streams import write_exactly

HEADER_ROOM = 256 << 10  # kept for a header that is written after its data; a file is full when it would not fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that its data takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shards(Protocol):
    """Files being filled."""

    def place(self, tensor: Declared) -> tuple[int, int]:
        """The file descriptor and offset for the tensor's data."""
        ...

    def finish(self) -> dict[str, tuple[Declared, ...]]:
        """Complete the headers; files by their final names, with what they hold."""
        ...


class PlannedShards:
    """Every tensor is known: headers are written first and tensors may come in any order."""

    def __init__(
        self, folder: Path, plan: Sequence[Declared], limit: int, metadata: Mapping[str, str], files: ExitStack
    ) -> None:
        self._shards = plan_shards(plan, limit)
        self._places: dict[str, tuple[int, int, Declared]] = {}
        self._missing = {tensor.name for tensor in plan}
        for name, tensors in self._shards.items():
            fd = _create(folder / name, files)
            header = make_header(((t.name, t.shape, t.dtype) for t in tensors), metadata)
            write_exactly(fd, header, 0)
            position = len(header)
            for tensor in tensors:
                if tensor.name in self._places:
                    raise ConversionError(f"{tensor.name}: declared twice in the plan of the export")
                self._places[tensor.name] = (fd, position, tensor)
                position += tensor.nbytes
            os.ftruncate(fd, position)

    def place(self, tensor: Declared) -> tuple[int, int]:
        """Raises: ConversionError for a tensor that the plan does not have so."""
        if tensor.name not in self._places:
            raise ConversionError(f"{tensor.name}: not in the plan of the export")
        fd, position, planned = self._places[tensor.name]
        if planned != tensor:
            raise ConversionError(
                f"{tensor.name}: expected {planned.dtype} of shape {list(planned.shape)}, "
                f"found {tensor.dtype} of shape {list(tensor.shape)}"
            )
        self._missing.discard(tensor.name)
        return fd, position

    def finish(self) -> dict[str, tuple[Declared, ...]]:
        """Raises: ConversionError when a planned tensor did not come."""
        missing = [name for name in self._places if name in self._missing]
        if missing:
            raise ConversionError(f"{missing[0]}: planned for the export but not given ({len(missing)} such)")
        return self._shards


class GrowingShards:
    """Tensors are laid down as they come; a file's header follows when all are there."""

    def __init__(self, folder: Path, limit: int, metadata: Mapping[str, str], files: ExitStack) -> None:
        self._folder, self._limit, self._metadata, self._files = folder, limit, metadata, files
        self._shards: list[tuple[int, list[Declared]]] = []
        self._position = self._room = 0

    def place(self, tensor: Declared) -> tuple[int, int]:
        """Append to the last file, or begin the next."""
        room = len(make_header([(tensor.name, tensor.shape, tensor.dtype)], {})) + 20  # offsets grow by some digits
        full = self._position + tensor.nbytes > self._limit + HEADER_ROOM or room > self._room
        if not self._shards or full:
            fd = _create(self._folder / self._draft(len(self._shards)), self._files)
            self._shards.append((fd, []))
            self._position = HEADER_ROOM
            self._room = HEADER_ROOM - len(make_header([], self._metadata))
        fd, tensors = self._shards[-1]
        tensors.append(tensor)
        position = self._position
        self._position += tensor.nbytes
        self._room -= room
        return fd, position

    def finish(self) -> dict[str, tuple[Declared, ...]]:
        """Headers are padded with spaces to the room kept for them."""
        if not self._shards:
            raise ConversionError("no tensors were given to export")
        found = {}
        for number, (fd, tensors) in enumerate(self._shards):
            header = make_header(((t.name, t.shape, t.dtype) for t in tensors), self._metadata, room=HEADER_ROOM)
            write_exactly(fd, header, 0)
            name = _file_name(number, len(self._shards))
            (self._folder / self._draft(number)).rename(self._folder / name)
            found[name] = tuple(tensors)
        return found

    @staticmethod
    def _draft(number: int) -> str:
        return f"{number}.draft"


def plan_shards(plan: Sequence[Declared], limit: int) -> dict[str, tuple[Declared, ...]]:
    """Files and their tensors, in order: a file ends before the tensor that would make it larger than the limit."""
    groups: list[list[Declared]] = [[]]
    size = 0
    for tensor in plan:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return {_file_name(number, len(groups)): tuple(group) for number, group in enumerate(groups)}


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _create(file: Path, files: ExitStack) -> int:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    files.callback(os.close, fd)
    return fd
