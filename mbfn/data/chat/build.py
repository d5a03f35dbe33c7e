"""A chat set, tokenised once: flat arrays of tokens and masks, offsets, places of the rows, and what was left out."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import batched
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import ChatData
from mbfn.data.bad_rows import check, counts, first_lines, located, reasons, write_bad_rows
from mbfn.data.chat.encode import ChatSample, encode_rows
from mbfn.data.chat.template import ChatTokenizer, open_chat_tokenizer
from mbfn.data.pool import ordered_map
from mbfn.data.sources import RowError, Shard, content_digest, find_files, read_shard, shards_of
from mbfn.errors import DataError

FORMAT = 2  # of the arrays and of how masks are found
BAD_ROWS = "bad_rows.jsonl"
_BATCH = 64  # rows that the tokenizer works on at once
_OPTIONS = ("form", "turns", "roles", "train_on_prompt", "reasoning", "date", "preference", "bad_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker has to know."""

    tokenizer: Path
    data: ChatData
    scratch: Path
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of a shard, whose arrays lie in the scratch directory."""

    rows: int = 0
    lines: int = 0
    lengths: list[int] = field(default_factory=list)  # of the samples
    at: list[int] = field(default_factory=list)  # line of each sample's row, within the shard
    bad: list[tuple[int, str]] = field(default_factory=list)
    trained: int = 0  # tokens
    typed: int = 0  # samples in which control tokens became text


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Samples:
    """A tokenised chat set, memory-mapped."""

    tokens: NDArray[np.unsignedinteger]  # of all samples, one after the other
    mask: NDArray[np.uint8]  # 1 where a token is trained
    offsets: NDArray[np.int64]  # sample i is offsets[i]:offsets[i + 1]
    places: NDArray[np.int64]  # (N, 2): file and line of sample i
    files: tuple[str, ...]
    rows: int
    trained: int  # tokens
    bad: Counter[str]  # rows left out, by reason
    typed: int
    entry: Path

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def positions(self) -> NDArray[np.int64]:
        """Places of a row that each sample takes."""
        return np.diff(self.offsets) - 1

    def place(self, sample: int) -> str:
        """FILE:LINE of a sample."""
        file, line = self.places[sample]
        return f"{self.files[file]}:{line}"


def samples_digest(files: Sequence[Path], tokenizer: str, data: ChatData) -> str:
    """A name for what `build` makes of the files."""
    options = {name: getattr(data, name) for name in _OPTIONS} | {"template": data.chat_template == "none"}
    said = json.dumps([content_digest(files, data.cache), tokenizer, options, FORMAT], default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def build(path: str, tokenizer: Path, data: ChatData, directory: Path) -> None:
    """Tokenise every row of `path` into `directory`.

    Raises: DataError for bad rows, unless they are to be skipped, and for a set without a good one.
    """
    files = find_files(path)
    shards = shards_of(files, data.workers)
    chat = _chat(tokenizer, data.chat_template, data.date)
    dtype = "uint16" if len(chat.tokenizer) <= 1 << 16 else "uint32"
    order = Order(tokenizer=tokenizer, data=data, scratch=directory, dtype=dtype)
    tasks = [(order, number, shard) for number, shard in enumerate(shards)]
    done = list(ordered_map(_work, tasks, data.workers))
    bad = list(located(shards, [part.lines for part in done], [part.bad for part in done]))
    check(bad, sum(part.rows for part in done), path, data.bad_rows)
    if not any(part.lengths for part in done):
        raise DataError(f"data.path: {path} has no row to train on; {reasons(counts(bad)) or 'it is empty'}")
    _join(directory, shards, done, dtype)
    write_bad_rows(directory / BAD_ROWS, bad)
    about = {
        "files": [str(file) for file in files],
        "rows": sum(part.rows for part in done),
        "trained": sum(part.trained for part in done),
        "typed": sum(part.typed for part in done),
        "bad": counts(bad),
    }
    (directory / "about.json").write_text(json.dumps(about))


def open_samples(entry: Path) -> Samples:
    """What `build` left in a directory."""
    about = json.loads((entry / "about.json").read_text())
    arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in ("tokens", "mask", "offsets", "places")}
    return Samples(
        **arrays,
        files=tuple(about["files"]),
        rows=about["rows"],
        trained=about["trained"],
        bad=Counter(about["bad"]),
        typed=about["typed"],
        entry=entry,
    )


@cache
def _chat(tokenizer: Path, chat_template: str, today: str) -> ChatTokenizer:
    return open_chat_tokenizer(tokenizer, chat_template, today)


def _work(task: tuple[Order, int, Shard]) -> Done:
    """Tokenise one shard into files of its own."""
    order, number, shard = task
    chat = _chat(order.tokenizer, order.data.chat_template, order.data.date)
    done, rows, typed, trained, lines = Done(), 0, 0, 0, 0
    with (
        (order.scratch / f"{number}.tokens").open("wb") as tokens,
        (order.scratch / f"{number}.mask").open("wb") as mask,
    ):
        for records in batched(read_shard(shard), _BATCH):
            lines, full = records[-1].line, [record for record in records if record.value is not None]
            results = encode_rows(chat, order.data, [record.value for record in full])
            for record, result in zip(full, results, strict=True):
                rows += 1
                if isinstance(result, RowError):
                    done.bad.append((record.line, str(result)))
                    continue
                for sample in result:
                    _write(sample, order.dtype, tokens, mask)
                    done.lengths.append(len(sample.ids))
                    done.at.append(record.line)
                    typed, trained = typed + (sample.typed > 0), trained + int(sample.mask[1:].sum())
    return Done(rows=rows, lines=lines, lengths=done.lengths, at=done.at, bad=done.bad, trained=trained, typed=typed)


def _write(sample: ChatSample, dtype: str, tokens: object, mask: object) -> None:
    sample.ids.astype(dtype).tofile(tokens)  # type: ignore[arg-type]
    sample.mask.tofile(mask)  # type: ignore[arg-type]


def _join(directory: Path, shards: Sequence[Shard], done: Sequence[Done], dtype: str) -> None:
    """The shards' arrays as one of each sort, read and written piece by piece."""
    lengths = np.asarray([length for part in done for length in part.lengths], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for name, kind in (("tokens", dtype), ("mask", "uint8")):
        whole = np.lib.format.open_memmap(directory / f"{name}.npy", "w+", np.dtype(kind), (int(offsets[-1]),))
        start = 0
        for number in range(len(shards)):
            file = directory / f"{number}.{name}"
            if size := file.stat().st_size:
                part = np.memmap(file, dtype=kind, mode="r")
                whole[start : start + len(part)] = part
                start += size // np.dtype(kind).itemsize
            os.unlink(file)
        whole.flush()
    files = list(dict.fromkeys(shard.file for shard in shards))
    before = first_lines(shards, [part.lines for part in done])
    places, start = np.empty((len(lengths), 2), dtype=np.int64), 0
    for shard, first, made in zip(shards, before, done, strict=True):
        stop = start + len(made.at)
        places[start:stop, 0] = files.index(shard.file)
        places[start:stop, 1] = np.asarray(made.at, dtype=np.int64) + first
        start = stop
    np.save(directory / "offsets.npy", offsets)
    np.save(directory / "places.npy", places)
