"""torch.save's container, an uncompressed zip: where the bytes of a record lie, and how to write one round a tensor.

Source: pytorch@caffe2/serialize/inline_container.cc; the zip format, APPNOTE 6.3.9 sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbfn.errors import CheckpointError
from mbfn.storage.pickles import dumps, tensor_pickle
from mbfn.storage.regions import pread_exactly

_LARGE = 0xFFFFFFFF  # a 32-bit field that says: see the zip64 one
_FLAGS = 0x0808  # UTF-8 names; sizes and CRC follow the data
_ALIGN = 64  # of a record's data, from the start of its archive
_TAIL = 2048  # bytes that hold the whole directory of a tensor's archive
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record of an archive: where its bytes lie in the file."""

    position: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorArchive:
    """An archive of one tensor: `head`, then `nbytes` of data, then `tail(crc)`."""

    head: bytes
    nbytes: int
    small: tuple[tuple[str, int, int, int], ...]  # name, place, size and CRC of each record before the data
    place: int  # of the data's record

    def tail(self, crc: int) -> bytes:
        """What follows the data: its descriptor, and the directory of the archive."""
        entries = (*self.small, ("archive/data/0", self.place, self.nbytes, crc))
        descriptor = _descriptor(crc, self.nbytes)
        directory = b"".join(_central(*entry) for entry in entries)
        return (
            descriptor + directory + _end(len(entries), len(directory), len(self.head) + self.nbytes + len(descriptor))
        )

    @property
    def length(self) -> int:
        """Bytes of the whole archive."""
        return len(self.head) + self.nbytes + len(self.tail(0))


def tensor_archive(shape: tuple[int, ...], dtype: torch.dtype) -> TensorArchive:
    """The archive that torch.save makes of a contiguous CPU tensor, with its data as the last record."""
    head, small = _records(tensor_pickle(shape, dtype))
    place, nbytes = len(head), math.prod(shape) * dtype.itemsize
    head += _local("archive/data/0", place, nbytes)
    return TensorArchive(head=head, nbytes=nbytes, small=small, place=place)


def value_archive(value: Any) -> bytes:
    """What torch.save makes of plain values without a tensor.

    Raises: TypeError for any other value.
    """
    head, small = _records(dumps(value))
    directory = b"".join(_central(*entry) for entry in small)
    return head + directory + _end(len(small), len(directory), len(head))


def _records(pickled: bytes) -> tuple[bytes, tuple[tuple[str, int, int, int], ...]]:
    """The records before the data, and name, place, size and CRC of each."""
    records = (
        ("archive/data.pkl", pickled),
        ("archive/.format_version", b"1"),
        ("archive/.storage_alignment", str(_ALIGN).encode()),
        ("archive/byteorder", b"little"),
        ("archive/version", b"3\n"),
    )
    head = b""
    small: list[tuple[str, int, int, int]] = []
    for name, content in records:
        crc = zlib.crc32(content)
        small.append((name, len(head), len(content), crc))
        head += _local(name, len(head), len(content)) + content + _descriptor(crc, len(content))
    return head, tuple(small)


def read_archive(fd: int, offset: int, length: int, path: Path) -> dict[str, Entry]:
    """Records of the archive at `offset`, by name without its first folder (`data.pkl`, `data/0`).

    Raises: CheckpointError when the bytes there are not a whole, uncompressed archive.
    """
    tail_at = max(0, length - _TAIL)
    tail = pread_exactly(fd, length - tail_at, offset + tail_at, path)
    try:
        count, size, start = _read_end(tail, tail_at)
        directory = pread_exactly(fd, size, offset + start, path)
        return dict(_entries(fd, offset, length, directory, count, path))
    except (struct.error, ValueError) as error:
        raise CheckpointError(
            f"{path}: no whole torch.save archive at byte {offset} ({error}); copy it again"
        ) from None


def _local(name: str, place: int, nbytes: int) -> bytes:
    """A record's header, padded so that its data is aligned."""
    text = name.encode()
    wide = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= _LARGE else b""
    pad = -(place + _LOCAL.size + len(text) + len(wide) + 4) % _ALIGN
    extra = wide + b"FB" + struct.pack("<H", pad) + b"Z" * pad
    small = _LARGE if wide else 0
    return (
        _LOCAL.pack(b"PK\x03\x04", 45 if wide else 0, _FLAGS, 0, 0, 0, 0, small, small, len(text), len(extra))
        + text
        + extra
    )


def _descriptor(crc: int, nbytes: int) -> bytes:
    return b"PK\x07\x08" + struct.pack("<IQQ" if nbytes >= _LARGE else "<III", crc, nbytes, nbytes)


def _central(name: str, place: int, nbytes: int, crc: int) -> bytes:
    text = name.encode()
    wide = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= _LARGE else b""
    small, version = (_LARGE, 45) if wide else (nbytes, 0)
    sizes = (crc, small, small, len(text), len(wide))
    return _CENTRAL.pack(b"PK\x01\x02", version, version, _FLAGS, 0, 0, 0, *sizes, 0, 0, 0, 0, place) + text + wide


def _end(count: int, size: int, start: int) -> bytes:
    wide = b""
    if start >= _LARGE:
        wide = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
        wide += _LOCATOR64.pack(b"PK\x06\x07", 0, start + size, 1)
    return wide + _END.pack(b"PK\x05\x06", 0, 0, count, count, size, min(start, _LARGE), 0)


def _read_end(tail: bytes, tail_at: int) -> tuple[int, int, int]:
    """Number of records, size and start of the directory; `tail` begins at `tail_at` of the archive."""
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise ValueError("no end of a zip")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    locator = at - _LOCATOR64.size
    if _LARGE in (size, start) and locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        where = _LOCATOR64.unpack_from(tail, locator)[2] - tail_at
        if where < 0 or tail[where : where + 4] != b"PK\x06\x06":
            raise ValueError("no zip64 end")
        *_, count, size, start = _END64.unpack_from(tail, where)
    if start + size > tail_at + at:
        raise ValueError("its directory leaves it")
    return count, size, start


def _entries(
    fd: int, offset: int, length: int, directory: bytes, count: int, path: Path
) -> Iterator[tuple[str, Entry]]:
    at = 0
    for _ in range(count):
        mark, _, _, _, method, _, _, crc, packed, nbytes, *rest = _CENTRAL.unpack_from(directory, at)
        name_size, extra_size, comment_size, _, _, _, place = rest
        name_at = at + _CENTRAL.size
        extra_at = name_at + name_size
        packed, nbytes, place = _widen(directory[extra_at : extra_at + extra_size], packed, nbytes, place)
        if mark != b"PK\x01\x02" or method != 0 or packed != nbytes:
            raise ValueError("a record is compressed or broken")
        local = pread_exactly(fd, _LOCAL.size, offset + place, path)
        *head, local_name, local_extra = _LOCAL.unpack(local)
        position = place + _LOCAL.size + local_name + local_extra
        if head[0] != b"PK\x03\x04" or position + nbytes > length:
            raise ValueError("a record leaves it")
        name = directory[name_at:extra_at].decode()
        yield name.partition("/")[2], Entry(position=offset + position, nbytes=nbytes, crc=crc)
        at = extra_at + extra_size + comment_size


def _widen(extra: bytes, packed: int, nbytes: int, place: int) -> tuple[int, int, int]:
    """The zip64 values of the fields that say so; the extra field holds them in the order size, packed, place."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            nbytes = values.pop(0) if nbytes == _LARGE else nbytes
            packed = values.pop(0) if packed == _LARGE else packed
            place = values.pop(0) if place == _LARGE else place
        at += 4 + size
    return packed, nbytes, place
