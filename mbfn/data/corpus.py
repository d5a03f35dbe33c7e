"""Megatron's corpora: PREFIX.bin holds tokens, PREFIX.idx the lengths, places and documents of its sequences.

Source: the format is that of Megatron-core's `datasets/indexed_dataset.py`, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbfn.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
_SAMPLED = 64  # places of a .bin file that its digest looks at


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Corpus:
    """A tokenised corpus, memory-mapped."""

    prefix: str
    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]  # of the sequences
    starts: NDArray[np.int64]  # of the sequences, in tokens
    about: dict[str, Any]  # what mbfn.tokenize wrote beside it, if it did

    @property
    def digest(self) -> str:
        """A name for the sequences: of the whole index, and of places all over the tokens."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for place in np.linspace(0, max(0, len(self.tokens) - 4096), _SAMPLED).astype(int):
            digest.update(self.tokens[place : place + 4096].tobytes())
        return digest.hexdigest()[:16]


def files_of(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a prefix."""
    base = Path(prefix).expanduser()
    return base.with_name(base.name + ".bin"), base.with_name(base.name + ".idx")


def about_file(prefix: str | Path) -> Path:
    """Where mbfn.tokenize says what it did."""
    base = Path(prefix).expanduser()
    return base.with_name(base.name + ".json")


def token_type(vocab_size: int) -> type[np.integer]:
    """The type that Megatron stores tokens of such a vocabulary in."""
    return np.uint16 if vocab_size < 65500 else np.int32


def index_bytes(lengths: NDArray[np.integer], dtype: type[np.integer]) -> bytes:
    """The .idx file of documents of these lengths, one sequence each."""
    size, code = np.dtype(dtype).itemsize, next(c for c, name in _DTYPES.items() if np.dtype(name) == np.dtype(dtype))
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = np.concatenate([[0], ends[:-1]]).astype(np.int64) * size if len(lengths) else np.empty(0, np.int64)
    parts = (
        _HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1),
        np.asarray(lengths, dtype=np.int32).tobytes(),
        pointers.tobytes(),
        np.arange(len(lengths) + 1, dtype=np.int64).tobytes(),
    )
    return b"".join(parts)


def open_corpus(prefix: str) -> Corpus:
    """Map a corpus into memory.

    Raises: DataError for one that is missing, of another format, or cut short.
    """
    tokens, index = files_of(prefix)
    for file in (index, tokens):
        if not file.is_file():
            raise DataError(
                f"data.path: no file {file}; `python -m mbfn.tokenize out={prefix}` writes {prefix}.bin and .idx"
            )
    raw = np.memmap(index, mode="r")
    if len(raw) < _HEADER.size or (header := _HEADER.unpack(raw[: _HEADER.size].tobytes()))[:2] != (_MAGIC, 1):
        raise DataError(
            f"data.path: {index} is not an index of Megatron's; expected it to begin with MMIDIDX, version 1"
        )
    _, _, code, count, documents = header
    needed = _HEADER.size + count * 12 + documents * 8
    if code not in _DTYPES or len(raw) < needed:
        raise DataError(
            f"data.path: {index} has {len(raw)} bytes, {count} sequences need {needed}; copy or make it again"
        )
    middle = _HEADER.size + 4 * count
    lengths = raw[_HEADER.size : middle].view(np.int32)
    pointers = raw[middle : middle + 8 * count].view(np.int64)
    dtype = np.dtype(_DTYPES[code])
    held, total = tokens.stat().st_size, int(np.sum(lengths, dtype=np.int64)) * dtype.itemsize
    if held < total:
        raise DataError(f"data.path: {tokens} has {held} bytes, its index needs {total}; copy or make it again")
    about = about_file(prefix)
    return Corpus(
        prefix=prefix,
        tokens=np.memmap(tokens, dtype=dtype, mode="r") if held else np.empty(0, dtype),
        lengths=lengths,
        starts=pointers // dtype.itemsize,
        about=json.loads(about.read_text()) if about.is_file() else {},
    )
