"""A directory written here is whole or absent: after errors, on full and read-only disks, and after kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mbfn.errors import CheckpointError
from mbfn.storage import Declared, open_hf, save_hf
from mbfn.storage.atomic import MANIFEST, atomic_directory, replace_by_renames


def export(path: Path, value: int, count: int = 8, shards: int = 3) -> None:
    """A small export whose every tensor is `value`."""
    tensors = {f"t{i}": torch.full((64, 33), value, dtype=torch.int32) for i in range(count)}
    save_hf(path, tensors, config={"value": value}, max_shard_bytes=64 * 33 * 4 * (-(-count // shards)))


def content(path: Path) -> set[int]:
    """All values of an export that is whole."""
    with open_hf(path) as hf:
        values = {int(v) for tensor in hf.values() for v in tensor.unique()}
        return values | {hf.config()["value"]}


def in_child(body: Callable[[], None]) -> int:
    """Run `body` in a forked process; 0: it returned, 1: CheckpointError, 2: anything else."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            body()
            code = 0
        except CheckpointError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_an_export_replaces_an_older_one_without_mixing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    export(out, 1, count=9, shards=3)
    export(out, 2, count=4, shards=2)
    assert content(out) == {2}
    files = [file.name for file in out.iterdir()]
    assert sorted(files) == sorted([*json.loads((out / MANIFEST).read_text())["files"], MANIFEST])
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    export(tmp_path / "out", 1)
    with contextlib.suppress(KeyboardInterrupt), atomic_directory(tmp_path / "out", kind="hf", manifest={}) as draft:
        (draft / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == {1}
    assert os.listdir(tmp_path) == ["out"]


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, 1)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError) as error:
        export(out, 2)
    assert str(error.value) == (
        f"{out}: holds notes/mine.txt, which mbfn did not write (1 such); choose another output or remove it"
    )
    assert (out / "notes" / "mine.txt").read_text() == "keep"
    assert content(out) == {1}
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a directory"):
        export(tmp_path / "file", 1)


def test_a_full_disk(tiny_disk: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs 0\.01 GB, the disk has 0\.00 GB free"):
        save_hf(tiny_disk / "out", {}, config={}, plan=[Declared(name="t", shape=(9_000_000,), dtype=torch.uint8)])
    with (
        pytest.raises(CheckpointError, match="disk is full or its quota reached; nothing was left there"),
        atomic_directory(tiny_disk / "out", kind="hf", manifest={}) as draft,
    ):
        (draft / "big").write_bytes(bytes(2 << 20))
    assert not list(tiny_disk.iterdir())


def test_a_file_size_limit(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        export(tmp_path / "out", 1, count=30, shards=1)

    assert in_child(limited) == 1
    assert not list(tmp_path.iterdir())


def test_a_read_only_target(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
        export(tiny_disk / "out", 1)


def test_killed_at_any_moment_the_old_or_the_new_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, 0)
    seen, generator = {0}, random.Random(7)
    for value in range(1, 25):
        child = os.fork()
        if child == 0:
            export(out, value, count=8 + value % 5)
            os._exit(0)
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        found = content(out)
        assert found in ((seen, {value}) if killed else ({value},))
        seen = found
    export(out, 99)
    assert content(out) == {99}
    assert os.listdir(tmp_path) == ["out"]


def test_a_draft_of_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", kind="hf", manifest={}) as draft:
        (draft / "kept").write_text("first")
        assert in_child(lambda: export(tmp_path / "out", 3)) == 0
        assert (draft / "kept").read_text() == "first"
        (tmp_path / "out" / MANIFEST).touch()
    assert (tmp_path / "out" / "kept").read_text() == "first"


def test_replacing_without_exchange(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    replace_by_renames(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "content").read_text() == "new"
    assert os.listdir(tmp_path) == ["old"]


def test_what_a_killed_replacement_moved_aside_comes_back(tmp_path: Path) -> None:
    export(tmp_path / "out", 1)
    (tmp_path / "out").rename(tmp_path / ".out.aside-12345678")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", kind="hf", manifest={}):
        raise RuntimeError
    assert content(tmp_path / "out") == {1}
