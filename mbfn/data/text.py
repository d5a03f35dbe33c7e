"""Where text comes from: a file, a directory of text files, or the language reference that ships with Python."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mbfn.errors import DataError

BUILTIN = "builtin:python-reference"
_TABLE = re.compile(r"\s*(\|.*\||\+[-=+]+)\s*")
_BLOCK = 1 << 20  # characters tokenised as one string


def read_documents(path: str) -> tuple[str, ...]:
    """The texts that `data.path` names, in a fixed order.

    Raises: DataError for a source that is missing, empty or not UTF-8.
    """
    if path == BUILTIN:
        return _python_reference()
    if path.startswith("builtin:"):
        raise DataError(f"data.path: unknown source {path}; the only builtin one is {BUILTIN}")
    documents = tuple(_read_file(file) for file in _files(Path(path).expanduser()))
    if not any(documents):
        raise DataError(f"data.path: {path} holds no text; give a file or a directory of *.txt files with text in them")
    return documents


def text_digest(documents: Iterable[str]) -> str:
    """A name for these documents in this order."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:16]


def blocks(document: str) -> Iterator[str]:
    """Pieces of about a mebibyte, cut after a line end, so that long documents are tokenised in bounded memory."""
    start = 0
    while len(document) - start > _BLOCK:
        cut = document.rfind("\n", start, start + _BLOCK) + 1
        stop = cut if cut > start else start + _BLOCK
        yield document[start:stop]
        start = stop
    yield document[start:]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"data.path: no file or directory {path}; give a text file, a directory of *.txt files, or {BUILTIN}"
        )
    files = sorted(path.glob("*.txt"))
    if not files:
        raise DataError(f"data.path: {path} has no *.txt file; put text there or name one file")
    return files


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: {path} is not UTF-8 at byte {error.start}; convert it, for instance with `iconv -t utf-8`"
        ) from error
    except OSError as error:
        raise DataError(f"data.path: cannot read {path}: {error.strerror}") from error


def _python_reference() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"data.path: this Python ships without pydoc_data, which {BUILTIN} reads; name a file"
        ) from error
    return ("\n\n".join(_prose(topics[name]) for name in sorted(topics)) + "\n",)


def _prose(topic: str) -> str:
    """The topic without the frames and rows of its tables, which a small model learns before it learns words."""
    lines = (line for line in topic.strip("\n").split("\n") if not _TABLE.fullmatch(line))
    return "\n".join(lines)
