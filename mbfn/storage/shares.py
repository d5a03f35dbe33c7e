"""One torch_dist checkpoint that several processes fill, each the files of its share; one of them then describes it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbfn.storage.dist_metadata import BACKEND, Placed, by_key, check_cover, metadata_bytes
from mbfn.storage.parts import Part, write_part
from mbfn.storage.sums import joined_crc, part_crc
from mbfn.storage.torch_dist_write import Chunk
from mbfn.storage.zips import tensor_archive

DIGESTS = "crc32"  # of mbfn.json: the CRC-32 of each file
SUM = "record_crc32"  # of mbfn.json: the CRC-32 of what else the saving program wrote there


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A chunk that stands in its file; what `.metadata` says of it."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process wrote, as values that travel to the one which describes the whole."""

    chunks: tuple[Written, ...]
    placed: tuple[Placed, ...]  # of the chunks
    blobs: tuple[Placed, ...]
    digests: Mapping[str, int]  # CRC-32 of each file


def write_share(directory: Path, rank: int, chunks: Sequence[Chunk], blobs: Mapping[str, bytes]) -> Share:
    """Write chunks and torch.save archives (by key) to `__<rank>_0.distcp`, and flush it to disk.

    Raises: OSError as the system gives it.
    """
    name = f"__{rank}_0.distcp"
    if not chunks and not blobs:
        return Share(chunks=(), placed=(), blobs=(), digests={})
    crc, end, places = 0, 0, list[Placed]()
    with (directory / name).open("xb", buffering=0) as file:
        for part, offset in _parts(chunks, blobs):
            part_end = part.position + len(part.head) + part.nbytes
            data_crc = write_part(file.fileno(), part)
            length = part_end + len(part.tail(data_crc)) - part.position
            crc, end = joined_crc(crc, part_crc(part, data_crc), length), part.position + length
            places.append(Placed(key=part.name, offset=offset, file=name, position=part.position, length=length))
        os.fsync(file.fileno())
    return Share(
        chunks=tuple(_written(chunk) for chunk in chunks),
        placed=tuple(places[len(blobs) :]),
        blobs=tuple(places[: len(blobs)]),
        digests={name: crc} if end else {},
    )


def describe_shares(directory: Path, shares: Sequence[Share]) -> dict[str, int]:
    """Make a checkpoint of the files that all processes wrote; the CRC-32 of every file in it.

    Raises: CheckpointError when the chunks do not cover a tensor exactly once.
    """
    chunks = [chunk for share in shares for chunk in share.chunks]
    placed = [place for share in shares for place in share.placed]
    blobs = [place for share in shares for place in share.blobs]
    for key, boxes in by_key(chunks).items():
        check_cover(key, boxes[0].global_shape, [(box.offset, box.shape) for box in boxes], directory)
    texts = {
        ".metadata": metadata_bytes(chunks, blobs, placed),
        "metadata.json": json.dumps({"sharded_backend": BACKEND, "sharded_backend_version": 1}).encode(),
    }
    for name, text in texts.items():
        (directory / name).write_bytes(text)
    digests = {name: crc for share in shares for name, crc in share.digests.items()}
    return digests | {name: zlib.crc32(text) for name, text in texts.items()}


def record_sum(manifest: Mapping[str, Any], names: Iterable[str]) -> int:
    """The CRC-32 of the values of a manifest that have these names."""
    text = json.dumps({name: manifest[name] for name in names}, sort_keys=True)
    return zlib.crc32(text.encode())


def _parts(chunks: Sequence[Chunk], blobs: Mapping[str, bytes]) -> list[tuple[Part, tuple[int, ...] | None]]:
    """Objects, then chunks, one after the other; with the offset of each chunk in its tensor."""
    parts: list[tuple[Part, tuple[int, ...] | None]] = []
    end = 0
    for key, blob in blobs.items():
        parts.append((Part(name=key, position=end, head=blob), None))
        end += len(blob)
    for chunk in chunks:
        archive = tensor_archive(chunk.shape, chunk.dtype)
        part = Part(
            name=chunk.key,
            position=end,
            head=archive.head,
            shape=chunk.shape,
            dtype=chunk.dtype,
            data=chunk.data,
            tail=archive.tail,
        )
        parts.append((part, chunk.offset))
        end += archive.length
    return parts


def _written(chunk: Chunk) -> Written:
    return Written(
        key=chunk.key, global_shape=chunk.global_shape, offset=chunk.offset, shape=chunk.shape, dtype=chunk.dtype
    )
