"""Records of JSONL, JSON, Parquet and Arrow files and of text files, in shards that workers read on their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mbfn.data.pool import cores
from mbfn.errors import DataError

Kind = Literal["jsonl", "json", "parquet", "arrow", "text"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
_SHARD_BYTES = 1 << 20, 16 << 20  # the smallest and the largest shard of a JSONL file
_SHARES = 6  # shards for each worker, so that none waits long for the last


class RowError(Exception):
    """Why one row cannot be used; the caller knows which row."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a file: bytes of a JSONL file, row groups or batches of a columnar one."""

    file: Path
    kind: Kind
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Record:
    """A row and its place: the line of a text file, else the number of the row, from 1 within the shard."""

    line: int
    value: Any  # a mapping; RowError; None where the line is empty


def find_files(path: str, field: str = "data.path") -> tuple[Path, ...]:
    """The data files that a path names: itself, or those of a directory, by name.

    Raises: DataError where there are none, or several splits to choose from.
    """
    root = Path(path).expanduser()
    known = ", ".join(_KINDS)
    if root.is_file():
        if root.suffix not in _KINDS:
            raise DataError(f"{field}: {root} is none of {known}; rename or convert it")
        return (root,)
    if not root.is_dir():
        raise DataError(f"{field}: no file or directory {root}; give one of {known}, or a directory of them")
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_text()).get("splits", [])
        raise DataError(
            f"{field}: {root} has the splits {', '.join(splits)}; name one: {root / (splits or ['train'])[0]}"
        )
    saved = (root / "state.json").is_file()  # by datasets' save_to_disk: the other files describe it
    files = sorted(root.glob("*.arrow" if saved else "*"))
    found = tuple(file for file in files if file.suffix in _KINDS and file.is_file())
    if not found:
        raise DataError(f"{field}: {root} has no {known} file; put data there or name one file")
    return found


def shards_of(files: Sequence[Path], workers: int = 0) -> list[Shard]:
    """The parts of the files, in order, several for each of `workers` processes (0: one a core)."""
    share = sum(file.stat().st_size for file in files) // (_SHARES * (workers or cores()))
    least, most = _SHARD_BYTES
    return [shard for file in files for shard in _shards(file, max(least, min(most, share)))]


def read_shard(shard: Shard) -> Iterator[Record]:
    """The records of a shard, with a RowError in place of one that cannot be read."""
    if shard.kind == "jsonl":
        return _read_lines(shard)
    if shard.kind == "text":
        return iter([Record(1, _text(shard.file))])
    return (Record(line, value) for line, value in enumerate(_read_rows(shard), start=1))


def content_digest(files: Sequence[Path], cache: str) -> str:
    """A name for what the files hold, in this order. A file that has not changed since is not read again."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{_file_digest(file, Path(cache).expanduser())}\n".encode())
    return digest.hexdigest()[:16]


def _file_digest(file: Path, cache: Path) -> str:
    status = file.stat()
    seen = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
    note = cache / "digests" / hashlib.sha256(seen.encode()).hexdigest()[:32]
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found)
    except OSError:
        return found  # the next run reads the file again
    return found


def _shards(file: Path, step: int) -> Iterator[Shard]:
    kind = _KINDS[file.suffix]
    if kind == "json" and _begins_with(file) != b"[":
        kind = "jsonl"
    size = file.stat().st_size
    if kind in ("parquet", "arrow"):
        parts = _parts(file, kind)
        size, step = parts, max(1, parts * step // max(1, size))
    elif kind != "jsonl":
        step = max(1, size)
    for start in range(0, size, step):
        yield Shard(file, kind, start, min(size, start + step))


def _begins_with(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _lines(shard: Shard) -> Iterator[bytes]:
    """The lines that begin inside the shard."""
    with shard.file.open("rb") as stream:
        if shard.start:
            stream.seek(shard.start - 1)
            stream.readline()
        position = stream.tell()
        while position < shard.stop and (line := stream.readline()):
            position += len(line)
            yield line


def _read_lines(shard: Shard) -> Iterator[Record]:
    for number, line in enumerate(_lines(shard), start=1):
        yield Record(number, None if line.isspace() else _parsed(line.removeprefix(b"\xef\xbb\xbf")))


def _parsed(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"wrong encoding: not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RowError("broken JSON: nested too deeply")
    return value if isinstance(value, dict) else RowError(f"no object but {type(value).__name__}")


def _read_rows(shard: Shard) -> Iterator[Any]:
    if shard.kind == "json":
        try:
            rows = json.loads(shard.file.read_bytes().decode("utf-8-sig"))
        except ValueError as error:
            raise DataError(f"data.path: {shard.file} is not JSON: {error}") from error
        yield from (row if isinstance(row, dict) else RowError(f"no object but {type(row).__name__}") for row in rows)
        return
    pyarrow = _pyarrow(shard.file)
    if shard.kind == "parquet":
        with pyarrow.parquet.ParquetFile(shard.file, memory_map=True) as source:
            for batch in source.iter_batches(row_groups=list(range(shard.start, shard.stop))):
                yield from batch.to_pylist()
        return
    with pyarrow.memory_map(str(shard.file)) as source, pyarrow.ipc.open_stream(source) as reader:
        for number, batch in enumerate(reader):
            if shard.start <= number < shard.stop:
                yield from batch.to_pylist()


def _parts(file: Path, kind: Kind) -> int:
    """Row groups of a Parquet file, batches of an Arrow one."""
    pyarrow = _pyarrow(file)
    try:
        if kind == "parquet":
            with pyarrow.parquet.ParquetFile(file) as source:
                return int(source.num_row_groups)
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
            return sum(1 for _ in reader)
    except pyarrow.ArrowException as error:
        raise DataError(f"data.path: {file} cannot be read: {str(error).splitlines()[0]}") from error


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"data.path: {file} needs pyarrow; pip install pyarrow, or convert it to JSONL") from error
    return pyarrow


def _text(file: Path) -> Any:
    try:
        return {"text": file.read_bytes().decode("utf-8")}
    except UnicodeDecodeError as error:
        return RowError(f"wrong encoding: not UTF-8 at byte {error.start}; convert it with `iconv -t utf-8`")
