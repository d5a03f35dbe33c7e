"""A flipped bit anywhere in the weights is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mbfn.errors import CheckpointError
from mbfn.storage import Chunk, check_digests, file_jobs, open_hf, open_torch_dist, save_hf, write_torch_dist


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 16]))


def test_an_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_hf(out, {"a": torch.ones(1000), "b": torch.zeros(9)}, config={}, max_shard_bytes=1000)
    assert check_digests(out) == 2
    with open_hf(out) as hf:
        meta = hf.meta("a")
    flip(meta.file, meta.offset + 3999)
    with pytest.raises(CheckpointError) as error:
        check_digests(out)
    assert str(error.value) == f"{meta.file}: a: bytes changed since it was written (1 such); copy it again"
    assert [job() for job in file_jobs(out)] == [
        f"{meta.file}: a: bytes changed since it was written; copy it again",
        "",
    ]


def test_an_export_of_another_tool_notes_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert check_digests(tmp_path) == 0
    assert file_jobs(tmp_path) == []


def test_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    halves = [
        Chunk(key="t", global_shape=(8, 4), offset=(at, 0), shape=(4, 4), dtype=torch.float32, data=torch.ones(4, 4))
        for at in (0, 4)
    ]
    write_torch_dist(out, halves)
    assert check_digests(out) == 2
    with open_torch_dist(out) as checkpoint:
        entry = checkpoint.archive("t", checkpoint.meta("t").chunks[1])
    flip(out / "__0_0.distcp", entry.position)
    with pytest.raises(CheckpointError, match=r"t at \[4, 0\]: bytes changed since it was written \(1 such\)"):
        check_digests(out)
    faults = [job() for job in file_jobs(out)]
    assert faults == ["", f"{out / '__0_0.distcp'}: t at [4, 0]: bytes changed since it was written; copy it again"]
