"""Checkpoints that Megatron-core saves are read here, those written here Megatron-core loads, at other layouts."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import queue
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert import to_megatron
from mbfn.convert.copies import Copy, contiguous_strides
from mbfn.convert.plans import checkpoint_chunks, checkpoint_hf_plans
from mbfn.convert.states import gather
from mbfn.convert.table import table_of
from mbfn.errors import CheckpointError
from mbfn.storage import Chunk, extra_states, open_torch_dist, read_manifest, streamed, write_torch_dist
from mbfn.storage.dist_metadata import COMMON
from tests.ranks import run_ranks

CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}


@pytest.fixture(scope="module")
def case() -> tuple[ModelConfig, dict[str, Tensor]]:
    from tests.megatron.tiny import config_of, hf_model, weights_of

    model = hf_model("qwen3")
    return config_of(model), weights_of(model)


def save_with_megatron(path: str, model: ModelConfig, parallel: ParallelConfig, hf: Mapping[str, Tensor]) -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as core_writer
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from mbfn import megatron
    from tests.megatron.tiny import run_config

    core_writer._results_queue = queue.Queue()
    with megatron.open_world(parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(hf, model, parallel=parallel, rank=world.rank)
        (chunk,) = megatron.build_model(run_config(model, parallel), world, own)
        state = chunk.sharded_state_dict(metadata={**CONTENT, "dp_cp_group": world.groups.dp_cp})
        state["step"] = 7
        dist_checkpointing.save(state, path, TorchDistSaveShardedStrategy(), content_metadata=dict(CONTENT))


def load_with_megatron(path: str, model: ModelConfig, parallel: ParallelConfig) -> tuple[dict, Any]:
    """The rank's own weights after loading, and what every rank shares."""
    from megatron.core import dist_checkpointing

    from mbfn import megatron
    from tests.megatron.tiny import run_config

    with megatron.open_world(parallel, device="cpu", timeout_s=60) as world:
        (chunk,) = megatron.build_model(run_config(model, parallel), world, None)
        metadata = {**CONTENT, "dp_cp_group": world.groups.dp_cp}
        found = dist_checkpointing.load(chunk.sharded_state_dict(metadata=metadata), path)
        common = {key: found.pop(key) for key in ("step", "content_metadata")}
        chunk.load_state_dict(found)
        return {name: value.clone() for name, value in chunk.state_dict().items() if torch.is_tensor(value)}, common


def write(path: Path, model: ModelConfig, parallel: ParallelConfig, hf: Mapping[str, Tensor]) -> None:
    chunks = []
    for rank, chunk in checkpoint_chunks(table_of(model, parallel), parallel):
        data = streamed(chunk.plan, hf)
        chunks.append(
            Chunk(
                key=chunk.key,
                global_shape=chunk.global_shape,
                offset=chunk.offset,
                shape=data.shape,
                dtype=data.dtype,
                data=data.read,
                rank=rank,
            )
        )
    objects = extra_states(table_of(model, parallel))
    write_torch_dist(
        path, chunks, objects=objects, common={"step": 7}, content_metadata=CONTENT, model=model, parallel=parallel
    )


def equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2), ParallelConfig(pp=2)], ids=["tp2", "pp2"])
def test_what_megatron_saved_is_read(tmp_path: Path, case: tuple, parallel: ParallelConfig) -> None:
    model, hf = case
    run_ranks(parallel.world_size, save_with_megatron, str(tmp_path), model, parallel, hf)
    with open_torch_dist(tmp_path) as checkpoint:
        assert checkpoint.common() == {"step": 7, "content_metadata": CONTENT}
        assert {checkpoint.load_object(key) for key in checkpoint.objects if key != COMMON} == {None}
        equal({p.name: gather(p, checkpoint) for p in checkpoint_hf_plans(table_of(model, parallel))}, hf)


@pytest.mark.parametrize("target", [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(pp=2)], ids=str)
def test_what_was_written_megatron_loads(tmp_path: Path, case: tuple, target: ParallelConfig) -> None:
    model, hf = case
    write(tmp_path / "out", model, ParallelConfig(tp=2, pp=2), hf)
    results = run_ranks(target.world_size, load_with_megatron, str(tmp_path / "out"), model, target)
    for rank, (weights, common) in enumerate(results):
        equal(weights, dict(to_megatron(hf, model, parallel=target, rank=rank)))
        assert common == {"step": 7, "content_metadata": CONTENT}


def test_the_files_are_those_that_megatron_writes(tmp_path: Path, case: tuple) -> None:
    model, hf = case
    parallel = ParallelConfig(tp=2)
    (tmp_path / "theirs").mkdir()
    run_ranks(2, save_with_megatron, str(tmp_path / "theirs"), model, parallel, hf)
    write(tmp_path / "ours", model, parallel, hf)
    assert set(os.listdir(tmp_path / "ours")) == {*os.listdir(tmp_path / "theirs"), "mbfn.json"}
    assert (tmp_path / "ours/metadata.json").read_text() == (tmp_path / "theirs/metadata.json").read_text()
    theirs, ours = (pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("theirs", "ours"))
    assert theirs.state_dict_metadata.keys() <= ours.state_dict_metadata.keys()
    for key, entry in theirs.state_dict_metadata.items():
        if hasattr(entry, "chunks"):
            mine = ours.state_dict_metadata[key]
            assert (mine.size, mine.properties) == (entry.size, entry.properties)
            assert sorted(map(repr, mine.chunks)) == sorted(map(repr, entry.chunks))
    files = {index: info.relative_path for index, info in theirs.storage_data.items() if index.offset is not None}
    assert {index: ours.storage_data[index].relative_path for index in files} == files


def test_a_region_of_a_checkpoint(tmp_path: Path) -> None:
    tensor = torch.arange(6 * 8 * 10, dtype=torch.int32).view(6, 8, 10)
    boxes = [((i, j, k), (1, 4, 5)) for i in range(6) for j in (0, 4) for k in (0, 5)]
    chunks = [
        Chunk(
            key="t",
            global_shape=(6, 8, 10),
            offset=at,
            shape=size,
            dtype=tensor.dtype,
            data=tensor[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))],
            rank=number % 3,
        )
        for number, (at, size) in enumerate(boxes)
    ]
    write_torch_dist(tmp_path / "out", chunks)
    with open_torch_dist(tmp_path / "out") as checkpoint:
        assert torch.equal(checkpoint["t"], tensor)
        out = torch.zeros(4, 6, 7, dtype=tensor.dtype)
        checkpoint.read_into(Copy("t", (4, 6, 7), 80 + 10 + 2, (80, 10, 1), 0, (42, 7, 1)), out)
        assert torch.equal(out, tensor[1:5, 1:7, 2:9])
        assert read_manifest(tmp_path / "out")["kind"] == "torch_dist"


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], Copy]:
    """A shape, where each of its dimensions is cut, and a copy of a box of it."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    box = tuple(draw(st.integers(1, size - first)) for first, size in zip(start, shape, strict=True))
    steps = contiguous_strides(shape)
    offset = sum(a * b for a, b in zip(start, steps, strict=True))
    return shape, cuts, Copy("t", box, offset, steps, 0, contiguous_strides(box))


@settings(max_examples=40, deadline=None)
@given(grids())
def test_any_grid_of_chunks(tmp_path_factory: pytest.TempPathFactory, grid: tuple) -> None:
    shape, cuts, copy = grid
    tensor = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    boxes = itertools.product(*(itertools.pairwise(cut) for cut in cuts))
    chunks = [
        Chunk(
            key="t",
            global_shape=shape,
            offset=tuple(a for a, _ in box),
            shape=tuple(b - a for a, b in box),
            dtype=tensor.dtype,
            data=tensor[tuple(slice(a, b) for a, b in box)],
            rank=number % 3,
        )
        for number, box in enumerate(boxes)
    ]
    path = tmp_path_factory.mktemp("grid") / "out"
    write_torch_dist(path, chunks)
    out = torch.zeros(copy.shape, dtype=tensor.dtype)
    with open_torch_dist(path) as checkpoint:
        assert torch.equal(checkpoint["t"], tensor)
        checkpoint.read_into(copy, out)
    assert torch.equal(out, tensor.as_strided(copy.shape, copy.src_strides, copy.src_offset))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool])
def test_archives_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load

    tensor = (torch.arange(21) % 2).to(torch.uint8).repeat(dtype.itemsize).view(dtype).view(3, 7)
    chunk = Chunk(key="t", global_shape=(3, 7), offset=(0, 0), shape=(3, 7), dtype=dtype, data=tensor)
    write_torch_dist(tmp_path / "out", [chunk])
    found = {"t": torch.zeros(3, 7, dtype=dtype)}
    load(found, storage_reader=FileSystemReader(tmp_path / "out"), no_dist=True)
    assert torch.equal(found["t"].view(torch.uint8), tensor.view(torch.uint8))


def test_nothing_a_pickle_names_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "harmed"),)

    write_torch_dist(tmp_path / "out", [])
    (tmp_path / "out" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="not the metadata of a torch_dist checkpoint"):
        open_torch_dist(tmp_path / "out")
    assert not (tmp_path / "harmed").exists()


def test_chunks_must_cover_a_tensor(tmp_path: Path) -> None:
    def chunk(at: tuple[int, int], size: tuple[int, int]) -> Chunk:
        data = torch.zeros(size)
        return Chunk(key="t", global_shape=(4, 4), offset=at, shape=size, dtype=data.dtype, data=data)

    for boxes, fault in [
        ([((0, 0), (2, 4))], "chunks hold 8 elements, the tensor of shape (4, 4) has 16"),
        ([((0, 0), (2, 4)), ((0, 0), (2, 4))], "chunks overlap, so others are missing; save the checkpoint again"),
        ([((0, 0), (2, 4)), ((3, 0), (2, 4))], "a chunk leaves the tensor of shape (4, 4); save the checkpoint again"),
    ]:
        assert sum(math.prod(size) for _, size in boxes) in (8, 16)
        with pytest.raises(CheckpointError) as error:
            write_torch_dist(tmp_path / "out", [chunk(*box) for box in boxes])
        assert str(error.value) == f"{tmp_path / 'out'}: t: {fault}"
    assert not list(tmp_path.iterdir())


def small(path: Path, *, shape: tuple[int, int] = (3, 4), fill: float = 1.0) -> None:
    data = torch.full(shape, fill)
    write_torch_dist(
        path, [Chunk(key="t", global_shape=shape, offset=(0, 0), shape=shape, dtype=data.dtype, data=data)]
    )


def cut(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def replace(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "not finished": (
        lambda d: (d / "metadata.json").unlink(),
        "{d}: no metadata.json, so no finished Megatron checkpoint; expected a torch_dist one",
    ),
    "another backend": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "{d}/metadata.json: expected sharded_backend 'torch_dist', found 'zarr'",
    ),
    "no metadata": (
        lambda d: (d / ".metadata").unlink(),
        "{d}/.metadata: cannot be read: No such file or directory; the checkpoint is not complete",
    ),
    "metadata cut": (lambda d: cut(d / ".metadata", 300), "{d}/.metadata: not a readable pickle: "),
    "data gone": (
        lambda d: (d / "__0_0.distcp").unlink(),
        "{d}/__0_0.distcp: cannot be opened: No such file or directory; copy it again",
    ),
    "data cut": (lambda d: cut(d / "__0_0.distcp", 2000), "{d}/__0_0.distcp: cut short: expected "),
    "data overwritten": (
        lambda d: replace(d / "__0_0.distcp", b"PK\x05\x06", b"PK\x05\x07"),
        "{d}/__0_0.distcp: no whole torch.save archive at byte ",
    ),
    "data of another": (
        lambda d: (small(d.parent / "other", shape=(4, 3)), shutil.copy(d.parent / "other" / "__0_0.distcp", d)),
        "{d}/__0_0.distcp: t at (0, 0): expected a contiguous torch.float32 of shape (3, 4), "
        "found torch.float32 of shape (4, 3); the .metadata is of another checkpoint",
    ),
    "file outside": (
        lambda d: replace(d / ".metadata", b"__0_0.distcp", b"../0.distcp/"),
        "{d}/.metadata: names a file outside the checkpoint: ../0.distcp/",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_checkpoints(tmp_path: Path, fault: str) -> None:
    damage, line = BROKEN[fault]
    small(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError) as error, open_torch_dist(tmp_path / "out") as checkpoint:
        checkpoint["t"]
    assert str(error.value).startswith(line.format(d=tmp_path / "out"))
    assert "\n" not in str(error.value)
