"""Directories that appear whole or not at all, also when the process is killed, and that replace only what mbfn wrote.

Content is written to a hidden sibling, flushed to disk, and put in place by one rename. A lock on the sibling tells a
writer at work from the leftover of a dead one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mbfn.errors import CheckpointError

MANIFEST = "mbfn.json"
FORMAT_VERSION = 1
HEAD = ("format_version", "kind", "packages", "files")  # what every manifest has; the rest is its writer's
_PACKAGES = ("mbfn", "torch", "safetensors", "megatron-core")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, kind: str, manifest: Mapping[str, Any], nbytes: int = 0
) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `path` when the block ends well and is removed otherwise.

    `mbfn.json` is added at the end: `kind`, the `manifest` as it is then, package versions, and the list of files.
    `nbytes`, where known, are asked of the disk beforehand.
    Raises: CheckpointError when `path` holds something that mbfn did not write, or cannot be written.
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    with clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clean(target)
        check_replaceable(target)
        check_space(target.parent, nbytes)
        draft, lock = _make_draft(target)
        try:
            yield draft
            write_manifest(draft, kind, manifest)
            sync_tree(draft)
            put_in_place(draft, target)
        finally:  # after the rename the draft is what was there before
            shutil.rmtree(draft, ignore_errors=True)
            os.close(lock)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `mbfn.json` of a directory; empty when it has none.

    Raises: CheckpointError when it is broken or of a later version of mbfn.
    """
    file = Path(path) / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = found["format_version"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error!r}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version {version}, expected {FORMAT_VERSION}; use the mbfn that wrote it"
        )
    return found


def write_manifest(directory: Path, kind: str, manifest: Mapping[str, Any]) -> None:
    """Describe a finished directory in its `mbfn.json`."""
    files = {str(file.relative_to(directory)): file.stat().st_size for file in _files(directory)}
    packages = {name: version for name in _PACKAGES if (version := version_of(name))}
    head = {"format_version": FORMAT_VERSION, "kind": kind, "packages": packages, "files": files}
    (directory / MANIFEST).write_text(json.dumps({**head, **manifest}, indent=1) + "\n", encoding="utf-8")


def check_replaceable(target: Path) -> None:
    """Refuse to take the place of anything but nothing, an empty directory, or what mbfn wrote itself.

    Raises: CheckpointError that names what is in the way.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise CheckpointError(f"{target}: exists and is not a directory; choose another output or remove it")
    found = {str(file.relative_to(target)) for file in _files(target)} | {
        str(entry.relative_to(target)) + "/"
        for entry in target.rglob("*")
        if entry.is_dir() and not any(entry.iterdir())
    }
    foreign = sorted(found - set(read_manifest(target).get("files", ())) - {MANIFEST})
    if foreign:
        raise CheckpointError(
            f"{target}: holds {foreign[0]}, which mbfn did not write ({len(foreign)} such); "
            "choose another output or remove it"
        )


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if not file.is_dir() or file.is_symlink())


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def clear_errors(target: Path) -> Iterator[None]:
    """The system's errors as one line about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CheckpointError(f"{target}: the disk is full or its quota reached; nothing was left there") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise CheckpointError(f"{target}: cannot be written: {error.strerror} ({error.filename})") from error
        raise CheckpointError(f"{target}: writing failed: {error}; nothing was left there") from error


def check_space(parent: Path, nbytes: int) -> None:
    disk = os.statvfs(parent)
    free = disk.f_bavail * disk.f_frsize
    if nbytes > free:
        raise CheckpointError(f"{parent}: needs {nbytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


def _make_draft(target: Path) -> tuple[Path, int]:
    """A locked directory beside `target`; the lock goes with the process."""
    while True:
        draft = target.parent / f".{target.name}.draft-{uuid.uuid4().hex[:8]}"
        draft.mkdir()
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try_lock(lock)
        if draft.exists():  # a cleaner may have come between
            return draft, lock
        os.close(lock)


def try_lock(fd: int) -> bool:
    """Whether the lock is ours: nobody is at work there. False where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clean(target: Path, keep: str = "") -> None:
    """Remove the drafts of dead writers, but not `keep`; put back what a writer had moved aside when it died."""
    for aside in target.parent.glob(f".{glob_escape(target.name)}.aside-*"):
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    for draft in target.parent.glob(f".{glob_escape(target.name)}.*-*"):
        if draft.name == keep or not draft.name.removeprefix(f".{target.name}.").startswith(("draft-", "part-")):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if try_lock(lock):
                    shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(lock)


def glob_escape(name: str) -> str:
    """`name` for use in a glob pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in (*files, "."):
            fd = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def put_in_place(draft: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(draft, target)
    elif not _exchange(draft, target):
        replace_by_renames(draft, target)
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; false where the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def replace_by_renames(draft: Path, target: Path) -> None:
    """Two renames, where there is no exchange (NFS); killed between them, the next writer puts the old one back."""
    aside = target.parent / f".{target.name}.aside-{uuid.uuid4().hex[:8]}"
    os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
