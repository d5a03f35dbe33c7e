"""A killed conversion goes on where it was; shares of one conversion need no word between them."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.table import table_of
from mbfn.errors import CheckpointError, ConversionError
from mbfn.storage import check_digests, open_hf, save_hf
from mbfn.storage.conversions import Care
from mbfn.storage.jobs import checkpoint_to_checkpoint, checkpoint_to_hf, hf_to_checkpoint
from mbfn.storage.parts import OutFile, Package, Part, share_of
from mbfn.storage.resume import Effort, write_package

MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=160,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=12,
    vocab_size=500,
    max_position_embeddings=64,
)
TP2PP2 = ParallelConfig(tp=2, pp=2)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "hf"
    shapes = table_of(MODEL, ParallelConfig()).hf_shapes
    torch.manual_seed(0)
    save_hf(directory, ((name, torch.randn(shape).bfloat16()) for name, shape in shapes.items()), MODEL)
    return directory


def numbers(seed: int, start: int, stop: int, out: Tensor) -> None:
    out.copy_((torch.arange(start, stop) * 31 + seed) % 251)


def package(files: int = 6, size: int = 3000) -> Package:
    """Files of two tensors each, whose directory has nothing besides."""
    return Package(
        kind="test",
        files=tuple(
            OutFile(
                name=f"f{number}",
                size=4 + 2 * size,
                parts=(
                    Part(name="head", position=0, head=b"head"),
                    Part(name="a", position=4, shape=(size,), data=partial(numbers, number)),
                    Part(name="b", position=4 + size, shape=(size,), data=partial(numbers, -number)),
                ),
            )
            for number in range(files)
        ),
        finish=lambda out, crcs: {"crc32": {name: list(values) for name, values in crcs.items()}},
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "mbfn.json"}


def box(out: Path) -> Path:
    (found,) = out.parent.glob(f".{out.name}.part-*")
    return found


WRITER = """
import sys, time
from tests.storage.test_resume import package, slowly, write_package, Effort
write_package(sys.argv[1], slowly(package(files=30)), source="s", effort=Effort(threads=2))
"""


def slowly(whole: Package) -> Package:
    """The same bytes, a while later."""
    from dataclasses import replace

    def slow(data: object, start: int, stop: int, out: Tensor) -> None:
        time.sleep(0.02)
        data(start, stop, out)  # type: ignore[operator]

    files = [
        replace(file, parts=tuple(replace(p, data=partial(slow, p.data)) if p.data else p for p in file.parts))
        for file in whole.files
    ]
    return replace(whole, files=tuple(files))


@pytest.mark.parametrize("over_another", [False, True])
def test_a_kill_at_any_moment_costs_unfinished_files_alone(tmp_path: Path, over_another: bool) -> None:
    """And until all is there, what stood before stays whole."""
    expected = tmp_path / "expected"
    write_package(expected, package(files=30), source="s", effort=Effort())
    out, times = tmp_path / "out", {}
    if over_another:
        write_package(out, package(files=40, size=500), source="older", effort=Effort())
    older = contents(out) if over_another else None
    for trial in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], cwd=Path(__file__).parents[2])
        while len(finished(out)) <= len(times) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.Random(trial).random() * 0.06)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not list(tmp_path.glob(".out.part-*/journal")):
            break  # it was done before the kill
        assert (contents(out) if out.exists() else None) == older
        assert times.items() <= finished(out).items(), "a finished file is not touched again"
        times = finished(out)
    else:
        last = write_package(out, package(files=30), source="s", effort=Effort())
        assert last.whole
        assert {*last.kept} == times.keys()
        assert len(times) > 2
    assert contents(out) == contents(expected)
    assert {entry.name for entry in tmp_path.iterdir()} == {"expected", "out"}


def finished(out: Path) -> dict[str, int]:
    """The files that have their notes, and when they were last written."""
    notes = out.parent.glob(f".{out.name}.part-*/journal/f*.json")
    return {note.stem: (note.parents[1] / "out" / note.stem).stat().st_mtime_ns for note in notes}


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        write_package(tmp_path / "out", package(), source="s", effort=Effort())

    child = os.fork()
    if child == 0:
        try:
            body()
        except CheckpointError as error:
            os._exit(0 if "disk is full or its quota reached; nothing was left there" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("important")
    with pytest.raises(CheckpointError, match=r"holds thesis.txt, which mbfn did not write"):
        write_package(tmp_path / "out", package(), source="s", effort=Effort())
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def interrupted(out: Path) -> Path:
    """Five of six files written; where they are."""
    whole = package()
    done = write_package(out, whole, source="s", effort=Effort(joins=False, index=0, count=1))
    assert not done.whole
    (box(out) / "journal" / "f5.json").unlink()
    return box(out) / "out"


def test_presence_is_not_enough(tmp_path: Path) -> None:
    """A finished file whose bytes changed since is written again, like one that is cut or gone."""
    out = tmp_path / "out"
    files = interrupted(out)
    with (files / "f1").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"?")
    os.truncate(files / "f2", 100)
    (files / "f3").unlink()
    done = write_package(out, package(), source="s", effort=Effort())
    assert (done.kept, done.written) == (("f0", "f4"), ("f1", "f2", "f3", "f5"))
    write_package(tmp_path / "expected", package(), source="s", effort=Effort())
    assert contents(out) == contents(tmp_path / "expected")


def test_another_source_or_plan_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    assert write_package(out, package(), source="changed", effort=Effort()).kept == ()
    assert write_package(out, package(size=2000), source="s", effort=Effort()).kept == ()
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}


def test_the_same_again_is_read_and_left(tmp_path: Path, hf_dir: Path) -> None:
    hf_to_checkpoint(hf_dir, tmp_path / "out", TP2PP2)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert hf_to_checkpoint(hf_dir, tmp_path / "out", TP2PP2).outcome.written == ()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == times
    file = tmp_path / "out/__0_0.distcp"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\xff\x00")
    assert len(hf_to_checkpoint(hf_dir, tmp_path / "out", TP2PP2).outcome.written) == 4
    assert check_digests(tmp_path / "out") > 0


def test_shares_divide_the_files_and_the_last_one_joins_them(tmp_path: Path, hf_dir: Path) -> None:
    whole = tmp_path / "whole"
    hf_to_checkpoint(hf_dir, whole, TP2PP2, care=Care(max_file_bytes=100_000))
    outcomes = [
        hf_to_checkpoint(
            hf_dir,
            tmp_path / "out",
            TP2PP2,
            care=Care(max_file_bytes=100_000),
            effort=Effort(index=index, count=3, run="job"),
        ).outcome
        for index in (2, 0, 1)
    ]
    assert [outcome.whole for outcome in outcomes] == [False, False, True]
    written = [set(outcome.written) for outcome in outcomes]
    assert set.union(*written) == {file.name for file in whole.glob("*.distcp")}
    assert sum(map(len, written)) == len(set.union(*written)) > 4
    for file in whole.glob("*.distcp"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert check_digests(tmp_path / "out") == check_digests(whole)


def test_no_stale_shards(tmp_path: Path, hf_dir: Path) -> None:
    hf_to_checkpoint(hf_dir, tmp_path / "m", TP2PP2)
    for limit, count in ((50_000, 10), (10**6, 1)):
        checkpoint_to_hf(tmp_path / "m", tmp_path / "out", care=Care(max_file_bytes=limit))
        assert len(list((tmp_path / "out").glob("*.safetensors"))) >= count
        assert (tmp_path / "out/model.safetensors.index.json").exists() == (count > 1)
        with open_hf(tmp_path / "out") as hf:
            assert len(hf) == 39
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_shares_are_even() -> None:
    files = package(files=7).files
    shares = [share_of(files, index, 3) for index in range(3)]
    assert sorted(file.name for share in shares for file in share) == [file.name for file in files]
    assert [len(share) for share in shares] == [3, 2, 2]


def test_two_at_one_file_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = interrupted(out)
    import fcntl

    with (files / "f5").open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"^f5: another process is writing it; give each its own share"):
            write_package(out, package(), source="s", effort=Effort())


def test_a_layout_there_and_back_is_the_same_weights(tmp_path: Path, hf_dir: Path) -> None:
    hf_to_checkpoint(hf_dir, tmp_path / "a", ParallelConfig())
    checkpoint_to_checkpoint(tmp_path / "a", tmp_path / "b", ParallelConfig(tp=4, pp=2))
    assert len(list((tmp_path / "b").glob("*.distcp"))) == 8
    assert json.loads((tmp_path / "b/mbfn.json").read_text())["parallel"]["tp"] == 4
    checkpoint_to_hf(tmp_path / "b", tmp_path / "back")
    with open_hf(hf_dir) as before, open_hf(tmp_path / "back") as after:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_cast_is_torchs(tmp_path: Path, hf_dir: Path) -> None:
    hf_to_checkpoint(hf_dir, tmp_path / "m", TP2PP2, care=Care(cast=torch.float32))
    checkpoint_to_hf(tmp_path / "m", tmp_path / "half", care=Care(cast=torch.float16))
    with open_hf(hf_dir) as before, open_hf(tmp_path / "half") as after:
        assert all(torch.equal(before[name].float().half(), after[name]) for name in before)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"


def spoiled(hf_dir: Path, to: Path, name: str, change: object) -> Path:
    with open_hf(hf_dir) as hf:
        items: Iterator[tuple[str, Tensor]] = ((n, change(hf[n]) if n == name else hf[n]) for n in hf)  # type: ignore[operator]
        save_hf(to, list(items), MODEL)
    return to


def test_a_dtype_that_the_config_does_not_say(tmp_path: Path, hf_dir: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    floats = spoiled(hf_dir, tmp_path / "floats", name, Tensor.float)
    with pytest.raises(ConversionError) as caught:
        hf_to_checkpoint(floats, tmp_path / "out", TP2PP2)
    assert str(caught.value) == (
        f"{floats}: {name}: expected torch.bfloat16 by the config, found torch.float32 (1 such); "
        "ask for a cast, dtype=bf16"
    )
    hf_to_checkpoint(floats, tmp_path / "cast", TP2PP2, care=Care(cast=torch.bfloat16))
    integers = spoiled(hf_dir, tmp_path / "integers", name, Tensor.char)
    for care in (Care(), Care(cast=torch.bfloat16)):
        with pytest.raises(ConversionError, match=rf"{name}: expected .*, found torch.int8 \(1 such\)$"):
            hf_to_checkpoint(integers, tmp_path / "out", TP2PP2, care=care)
    assert not (tmp_path / "out").exists()


def test_nan_is_found_on_request(tmp_path: Path, hf_dir: Path) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        tensor[7, 3] = float("nan")
        return tensor

    source = spoiled(hf_dir, tmp_path / "nan", "model.layers.2.self_attn.o_proj.weight", spoil)
    hf_to_checkpoint(source, tmp_path / "out", TP2PP2)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConversionError, match=r"^model.layers.2.self_attn.o_proj.weight: NaN, first at element"):
        hf_to_checkpoint(source, tmp_path / "out", TP2PP2, care=Care(nan=True))
    assert {entry.name for entry in tmp_path.iterdir()} == {"nan"}
