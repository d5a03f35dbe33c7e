"""Documents -> a Megatron corpus: shards tokenised by processes, joined in order, put in place whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import batched, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mbfn.data.bad_rows import BadRow, check, located
from mbfn.data.corpus import about_file, files_of, index_bytes, token_type
from mbfn.data.pool import ordered_map
from mbfn.data.sources import RowError, Shard, find_files, read_shard, shards_of
from mbfn.data.text import blocks
from mbfn.data.tokenizer import TokenizerFiles, eos_of
from mbfn.errors import DataError

if TYPE_CHECKING:
    import tokenizers

_BATCH = 256  # documents that the tokenizer works on at once
_COPY = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to tokenise, how, and where to."""

    path: str
    out: str
    tokenizer: TokenizerFiles
    text_key: str
    head: tuple[int, ...]  # tokens before every document
    tail: tuple[int, ...]  # and after
    bad_rows: str
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A shard, and the file for its tokens."""

    order: Order
    shard: Shard
    file: Path
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What became of a shard."""

    lengths: np.ndarray  # of its documents
    rows: int
    lines: int
    empty: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a corpus holds, and what was left out of it."""

    documents: int
    tokens: int
    empty: int
    bad: tuple[BadRow, ...]


def order_of(
    path: str, out: str, tokenizer: TokenizerFiles, *, text_key: str, bos: bool, eod: bool, bad_rows: str, workers: int
) -> Order:
    """Resolve the tokens round a document. Raises: DataError for a tokenizer that has none."""
    named = {}
    for wanted, name in ((bos, "bos_token"), (eod, "eos_token")):
        token = eos_of(tokenizer, name) if wanted else None
        if wanted and token is None:
            field = "append_eod" if name == "eos_token" else "prepend_bos"
            raise DataError(f"{field}: {tokenizer.directory} names no {name}; set {field}=false, or name it there")
        named[name] = () if token is None else (token,)
    return Order(
        path=path,
        out=out,
        tokenizer=tokenizer,
        text_key=text_key,
        head=named["bos_token"],
        tail=named["eos_token"],
        bad_rows=bad_rows,
        workers=workers,
    )


def tokenise(order: Order) -> Written:
    """Write `out`.bin, .json and, last, .idx: a corpus without its index is not one.

    Raises: DataError for bad rows, unless they are to be skipped, and where nothing is left.
    """
    shards, (binary, index) = shards_of(find_files(order.path, "path"), order.workers), files_of(order.out)
    binary.parent.mkdir(parents=True, exist_ok=True)
    dtype = token_type(max(_loaded(order.tokenizer).get_vocab().values()) + 1)
    scratch = Path(tempfile.mkdtemp(prefix=f".{binary.name}.", dir=binary.parent))
    try:
        tasks = [
            Task(order=order, shard=shard, file=scratch / str(number), dtype=np.dtype(dtype).name)
            for number, shard in enumerate(shards)
        ]
        parts = list(ordered_map(_work, tasks, order.workers))
        bad = tuple(located(shards, [part.lines for part in parts], [part.bad for part in parts]))
        check(bad, sum(part.rows for part in parts), order.path, order.bad_rows, prefix="")
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.empty(0, np.int64)
        if not len(lengths):
            raise DataError(f"path: {order.path} holds no text")
        whole = _joined([task.file for task in tasks])
        (scratch / "index").write_bytes(index_bytes(lengths, dtype))
        written = Written(
            documents=len(lengths), tokens=int(lengths.sum()), empty=sum(part.empty for part in parts), bad=bad
        )
        (scratch / "about").write_text(json.dumps(_about(order, written), indent=2) + "\n")
        index.unlink(missing_ok=True)
        for made, target in ((whole, binary), (scratch / "about", about_file(order.out)), (scratch / "index", index)):
            os.replace(made, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return written


@cache
def _loaded(tokenizer: TokenizerFiles) -> tokenizers.Tokenizer:
    return tokenizer.load()


def _work(task: Task) -> Part:
    order, tokenizer = task.order, _loaded(task.order.tokenizer)
    lengths: list[int] = []
    bad: list[tuple[int, str]] = []
    rows = lines = empty = 0
    with task.file.open("wb") as out:
        for records in batched(read_shard(task.shard), _BATCH):
            lines, texts = records[-1].line, []
            for record in records:
                text = _text(record.value, order.text_key)
                rows += record.value is not None
                if isinstance(text, RowError):
                    bad.append((record.line, str(text)))
                elif text:
                    texts.append(text)
                else:
                    empty += record.value is not None
            lengths += _write(out, tokenizer, texts, task)
    return Part(lengths=np.asarray(lengths, dtype=np.int64), rows=rows, lines=lines, empty=empty, bad=bad)


def _text(row: Any, key: str) -> str | RowError:
    """The text of a row; nothing of an empty line."""
    if row is None or isinstance(row, RowError):
        return "" if row is None else row
    if key not in row:
        return RowError(f"no {key!r}: found {', '.join(map(repr, row)) or 'nothing'}; text_key names the field")
    return row[key] if isinstance(row[key], str) else RowError(f"no text in {key!r}: {type(row[key]).__name__}")


def _write(out: BinaryIO, tokenizer: tokenizers.Tokenizer, texts: Sequence[str], task: Task) -> list[int]:
    """Append documents; how many tokens each has."""
    order = task.order
    pieces = [list(blocks(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch_fast(list(chain.from_iterable(pieces)), add_special_tokens=False))
    lengths, ids = [], []
    for parts in pieces:
        found = [next(encoded).ids for _ in parts]
        ids += [order.head, *found, order.tail]
        lengths.append(len(order.head) + sum(map(len, found)) + len(order.tail))
    np.fromiter(chain.from_iterable(ids), dtype=task.dtype, count=sum(lengths)).tofile(out)
    return lengths


def _joined(files: Sequence[Path]) -> Path:
    """All files behind one another in the first of them, flushed to disk."""
    with files[0].open("ab") as out:
        for file in files[1:]:
            with file.open("rb") as part:
                shutil.copyfileobj(part, out, _COPY)
            file.unlink()
        out.flush()
        os.fsync(out.fileno())
    return files[0]


def _about(order: Order, written: Written) -> dict[str, Any]:
    return {
        "tokenizer": str(order.tokenizer.directory.resolve()),
        "tokenizer_digest": order.tokenizer.digest,
        "source": order.path,
        "documents": written.documents,
        "tokens": written.tokens,
        "empty": written.empty,
        "bad_rows": len(written.bad),
    }
