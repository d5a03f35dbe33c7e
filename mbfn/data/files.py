"""Entries of the data cache: named by the digest of what they were made from, made once, whole or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mbfn.errors import DataError


def cached(cache: str, name: str, make: Callable[[Path], None]) -> Path:
    """The cache entry `name`, a directory that `make` fills if nobody has yet.

    Ranks and runs may ask at once: the first makes it, the others wait. Should the lock not hold (some network file
    systems), the entry is still whole, because it appears by renaming.
    """
    root = Path(cache).expanduser()
    entry = root / name
    if entry.is_dir():
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock"):
            if not entry.is_dir():
                _make(root, entry, make)
    except OSError as error:
        raise DataError(
            f"data.cache: cannot write {entry}: {error.strerror}; set data.cache to a directory with room"
        ) from error
    return entry


def _make(root: Path, entry: Path, make: Callable[[Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=root))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            os.replace(scratch, entry)
        except OSError:
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)
