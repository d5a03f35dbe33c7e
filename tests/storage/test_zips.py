"""The archives written round tensors are zips to Python and checkpoints to torch, also beyond 4 GiB."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from mbfn.storage.pickles import STORAGES
from mbfn.storage.zips import read_archive, tensor_archive, value_archive


@pytest.mark.parametrize("dtype", [*STORAGES, torch.float8_e5m2, torch.uint32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)], ids=str)
def test_a_small_one(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    file = tmp_path / "t.pt"
    archive = tensor_archive(shape, dtype)
    data = bytes(number % 2 for number in range(archive.nbytes))
    file.write_bytes(archive.head + data + archive.tail(zlib.crc32(data)))
    assert file.stat().st_size == archive.length
    assert len(archive.head) % 64 == 0
    found = torch.load(file, weights_only=True)
    assert (found.dtype, tuple(found.shape)) == (dtype, shape)
    assert bytes(found.reshape(-1).view(torch.uint8).numpy()) == data
    with zipfile.ZipFile(file) as opened:
        assert opened.testzip() is None
        assert opened.read("archive/data/0") == data


def test_one_that_torch_wrote(tmp_path: Path) -> None:
    file = tmp_path / "t.pt"
    tensor = torch.arange(30, dtype=torch.int16)
    torch.save(tensor, file)
    fd = os.open(file, os.O_RDONLY)
    try:
        entry = read_archive(fd, 0, file.stat().st_size, file)["data/0"]
        assert os.pread(fd, entry.nbytes, entry.position) == bytes(tensor.view(torch.uint8).numpy())
    finally:
        os.close(fd)


@pytest.mark.parametrize("count", [(1 << 32) - 800, (1 << 32) - 1, (1 << 32) + 5], ids=["directory", "limit", "beyond"])
def test_one_of_four_gigabytes(tmp_path: Path, count: int) -> None:
    file = tmp_path / "t.pt"
    archive = tensor_archive((count,), torch.uint8)
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, archive.head, 0)
        os.pwrite(fd, b"\x07", len(archive.head) + count - 1)  # the rest is a hole
        os.pwrite(fd, archive.tail(5), len(archive.head) + count)
        entry = read_archive(fd, 0, archive.length, file)["data/0"]
        assert (entry.position, entry.nbytes, entry.crc) == (len(archive.head), count, 5)
    finally:
        os.close(fd)
    with zipfile.ZipFile(file) as opened:
        assert opened.getinfo("archive/data/0").file_size == count
    found = torch.load(file, mmap=True, weights_only=True)
    assert tuple(found.shape) == (count,)
    assert int(found[-1]) == 7


@pytest.mark.parametrize("value", [None, [None], {"a": 1, "b": (2.5, "x", True, -(1 << 40)), "c": {"d": []}}], ids=str)
def test_plain_values(tmp_path: Path, value: object) -> None:
    file = tmp_path / "v.pt"
    file.write_bytes(value_archive(value))
    assert torch.load(file, weights_only=True) == value
    with zipfile.ZipFile(file) as opened:
        assert opened.testzip() is None
    with pytest.raises(TypeError):
        value_archive(object())
