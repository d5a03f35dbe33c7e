"""Files whose every byte has its place before anything is written: what a conversion writes, checks and resumes."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbfn.errors import CheckpointError
from mbfn.storage.streams import BUFFER, Read, write_exactly, write_tensor

type Crcs = Mapping[str, tuple[int, ...]]  # of the data of each part of each file


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes that stand together in a file: `head`, then a tensor's data, then `tail(CRC-32 of the data)`."""

    name: str
    position: int
    head: bytes = b""
    shape: tuple[int, ...] = (0,)
    dtype: torch.dtype = torch.uint8
    data: Tensor | Read | None = None
    tail: Callable[[int], bytes] = lambda crc: b""

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return 0 if self.data is None else torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class OutFile:
    """A file to write."""

    name: str
    size: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A directory to write: large files part by part, then `finish(directory, crcs)`, which adds what describes them.

    `finish` returns what `mbfn.json` says besides the files.
    """

    kind: str
    files: tuple[OutFile, ...]
    finish: Callable[[Path, Crcs], Mapping[str, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the large files."""
        return sum(file.size for file in self.files)


def write_part(fd: int, part: Part, buffer: int = BUFFER) -> int:
    """Write a part to its place; returns the CRC-32 of its data."""
    write_exactly(fd, part.head, part.position)
    at = part.position + len(part.head)
    crc = 0 if part.data is None else write_tensor(fd, at, part.shape, part.dtype, part.data, buffer=buffer)
    write_exactly(fd, part.tail(crc), at + part.nbytes)
    return crc


def holds_part(fd: int, part: Part, crc: int, path: Path) -> bool:
    """Whether the part stands at its place, its data with this CRC-32."""
    at = part.position + len(part.head)
    tail = part.tail(crc)
    return (
        os.pread(fd, len(part.head), part.position) == part.head
        and crc_of(fd, at, part.nbytes, path) == crc
        and os.pread(fd, len(tail), at + part.nbytes) == tail
    )


def crc_of(fd: int, place: int, nbytes: int, path: Path) -> int:
    """CRC-32 of a stretch of a file.

    Raises: CheckpointError when the file ends before it.
    """
    crc, done = 0, 0
    buffer = memoryview(bytearray(min(BUFFER, nbytes)))
    while done < nbytes:
        count = os.preadv(fd, [buffer[: nbytes - done]], place + done)
        if not count:
            raise CheckpointError(f"{path}: cut short: {nbytes - done} bytes of its tensors are missing")
        crc = zlib.crc32(buffer[:count], crc)
        done += count
    return crc


def share_of(files: Iterable[OutFile], index: int, count: int) -> tuple[OutFile, ...]:
    """The files that worker `index` of `count` writes: every worker finds the same division by itself, by size."""
    loads = [0] * count
    mine = []
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        taker = loads.index(min(loads))
        loads[taker] += file.size
        if taker == index:
            mine.append(file)
    return tuple(sorted(mine, key=lambda file: file.name))
