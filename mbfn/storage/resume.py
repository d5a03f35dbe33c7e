"""Packages written so that a kill costs one file, and that several processes share without talking to each other.

The files grow in a hidden sibling named by the conversion (its sources and its plan). Each finished file is flushed and
noted in a journal with the CRC-32 of its parts; a later run reads it again and keeps it where they still agree. Whoever
finds all files finished adds the descriptions and puts the directory in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mbfn.errors import CheckpointError
from mbfn.storage.atomic import (
    check_replaceable,
    check_space,
    clean,
    clear_errors,
    put_in_place,
    read_manifest,
    sync_tree,
    try_lock,
    version_of,
    write_manifest,
)
from mbfn.storage.journal import Site, note, note_file, noted, put_note
from mbfn.storage.parts import OutFile, Package, Part, holds_part, share_of, write_part
from mbfn.storage.streams import BUFFER, run_all

CONVERSION = "conversion"  # of mbfn.json: which conversion wrote the directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How a package is written: threads of this process, bytes each holds, which share of the files is this one's."""

    threads: int = 2
    buffer: int = BUFFER
    index: int = 0
    count: int = 1
    joins: bool = True  # puts the directory in place when all files are there
    run: str = ""  # names what started this process with others: their finished files need no second reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one process did of a package."""

    whole: bool  # the directory stands in its place
    written: tuple[str, ...] = ()  # files
    kept: tuple[str, ...] = ()  # files of an earlier run, their digests compared


def identity(package: Package, source: str) -> str:
    """The digest of a conversion: what it reads, and every place that it writes to."""
    plan = [
        (file.name, file.size, [(part.name, part.position, part.nbytes) for part in file.parts])
        for file in package.files
    ]
    text = json.dumps([version_of("mbfn"), package.kind, source, plan])
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """What tells one state of a directory's files from another without reading them: names, sizes, times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    facts = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_package(path: str | os.PathLike[str], package: Package, *, source: str, effort: Effort) -> Outcome:
    """Write this process's share of a package, and the directory when that was the last share.

    `source`: `fingerprint` of what is read. What an earlier, killed run of the same conversion finished is kept.
    Raises: CheckpointError when `path` holds something that mbfn did not write, or cannot be written.
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    name = identity(package, source)
    with clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(target)
        if read_manifest(target).get(CONVERSION) == name and _is_intact(target, effort.threads):
            clean(target)
            return Outcome(whole=True, kept=tuple(file.name for file in package.files))
        box = target.parent / f".{target.name}.part-{name[:12]}"
        clean(target, keep=box.name)
        with _shared(box):
            check_space(target.parent, package.nbytes - _taken(box))
            try:
                return _advance(Site(target=target, box=box, name=name), package, effort)
            except FileNotFoundError:  # another share's process found all there and put it in place
                if read_manifest(target).get(CONVERSION) != name:
                    raise
                return Outcome(whole=False)


def write_files(out: Path, files: Iterable[OutFile], threads: int) -> dict[str, tuple[int, ...]]:
    """Write files into the directory `out`; returns the CRC-32 of every part's data."""
    found: dict[str, tuple[int, ...]] = {}
    _write(out, files, Effort(threads=threads), lambda file, crcs: found.update({file.name: crcs}))
    return found


def _advance(site: Site, package: Package, effort: Effort) -> Outcome:
    for folder in (site.out, site.journal):
        folder.mkdir(exist_ok=True)
    run = effort.run or uuid.uuid4().hex
    kept, written = _ensure(site, share_of(package.files, effort.index, effort.count), effort, run)
    if not effort.joins or not all(noted(site, file.name) for file in package.files):
        return Outcome(whole=False, written=written, kept=kept)
    with _alone(site.journal / "assembly") as mine:
        if not mine:
            return Outcome(whole=False, written=written, kept=kept)
        also_kept, also_written = _ensure(site, package.files, effort, run)
        crcs = {file.name: tuple(note(site, file.name)["crc32"]) for file in package.files}
        manifest = {CONVERSION: site.name, **package.finish(site.out, crcs)}
        write_manifest(site.out, package.kind, manifest)
        sync_tree(site.out)
        put_in_place(site.out, site.target)
    shutil.rmtree(site.box, ignore_errors=True)
    kept = tuple(sorted({*kept, *also_kept} - {*written}))
    return Outcome(whole=True, written=(*written, *also_written), kept=kept)


def _ensure(site: Site, files: Iterable[OutFile], effort: Effort, run: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files that stood already, and of those written now. Notes of this same run are trusted."""
    kept, missing = [], []
    for file in files:
        found = note(site, file.name)
        if found.get("run") == run:
            continue
        if found and _is_whole(site, file, found["crc32"], effort.threads):
            put_note(site, file.name, found["crc32"], run)
            kept.append(file.name)
        else:
            note_file(site, file.name).unlink(missing_ok=True)
            missing.append(file)
    _write(site.out, missing, effort, lambda file, crcs: put_note(site, file.name, crcs, run))
    return tuple(kept), tuple(file.name for file in missing)


def _is_whole(site: Site, file: OutFile, crcs: list[int], threads: int) -> bool:
    path = site.out / file.name
    if not path.exists() or path.stat().st_size != file.size or len(crcs) != len(file.parts):
        return False
    with path.open("rb") as stream:
        pairs = zip(file.parts, crcs, strict=True)
        return all(run_all((partial(holds_part, stream.fileno(), *pair, path) for pair in pairs), threads))


def _write(
    out: Path, files: Iterable[OutFile], effort: Effort, on_file: Callable[[OutFile, tuple[int, ...]], None]
) -> None:
    """Part by part over the threads; whoever ends the last of a file flushes it and calls `on_file`."""
    with contextlib.ExitStack() as stack:
        run_all((job for file in files for job in _jobs(out, file, effort, on_file, stack)), effort.threads)


def _jobs(
    out: Path,
    file: OutFile,
    effort: Effort,
    on_file: Callable[[OutFile, tuple[int, ...]], None],
    stack: contextlib.ExitStack,
) -> Iterator[Callable[[], None]]:
    fd = _open_alone(out / file.name)
    closing = stack.enter_context(contextlib.ExitStack())
    closing.callback(os.close, fd)
    os.ftruncate(fd, 0)
    os.ftruncate(fd, file.size)
    crcs: dict[int, int] = {}
    lock = threading.Lock()

    def job(number: int, part: Part) -> None:
        crc = write_part(fd, part, effort.buffer)
        with lock:
            crcs[number] = crc
            last = len(crcs) == len(file.parts)
        if last:
            os.fsync(fd)
            closing.close()
            on_file(file, tuple(crcs[at] for at in range(len(crcs))))

    yield from (partial(job, number, part) for number, part in enumerate(file.parts))


def _open_alone(path: Path) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if not _lock_file(fd):
        os.close(fd)
        raise CheckpointError(f"{path.name}: another process is writing it; give each its own share with part=K/N")
    return fd


def _taken(box: Path) -> int:
    """Bytes on disk of what an earlier run left."""
    return sum(file.stat().st_blocks * 512 for file in (box / "out").glob("*"))


def _is_intact(target: Path, threads: int) -> bool:
    from mbfn.storage.digests import check_digests

    try:
        return check_digests(target, workers=threads) > 0
    except CheckpointError:
        return False


@contextlib.contextmanager
def _shared(box: Path) -> Iterator[None]:
    """Keep others from removing `box`; it goes with an error, and stays for another run when this one is killed."""
    lock = _hold(box)
    try:
        yield
    except Exception:
        if try_lock(lock):  # nobody else is at work there
            shutil.rmtree(box, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _hold(box: Path) -> int:
    while True:
        box.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(box, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            if box.exists():  # a cleaner may have come between
                return lock
            os.close(lock)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock `path`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _lock_file(fd)
    finally:
        os.close(fd)


def _lock_file(fd: int) -> bool:
    """False where another process holds it; true on a file system without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
