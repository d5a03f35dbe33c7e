"""`python -m mbfn.convert` under srun: every task takes its share, untold and without a word between them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.directories import tiny_directory
from tests.slurm.box import Box
from tests.slurm.client import command, finish

FILES = "max_file=40KB"  # several files a rank, so that every task has some


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model") / "hf")


def convert(box: Box, tasks: tuple[str, ...], *arguments: str) -> str:
    options = ("--export=ALL,TORCH_COMPILE_DISABLE=1,OMP_NUM_THREADS=1", "--cpus-per-task=1", f"--chdir={box.root}")
    return box.run("srun", *tasks, *options, sys.executable, "-m", "mbfn.convert", *arguments, timeout=240)


def test_tasks_of_two_nodes_share_a_conversion(box: Box, hf_dir: Path, tmp_path: Path) -> None:
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    what = (f"hf={hf_dir}", "parallel=tp2pp2", FILES)
    said = convert(box, ("--nodes=2", "--ntasks=4"), *what, f"out={shared}").splitlines()
    assert len(said) == 4
    assert sum("47 tensors" in line for line in said) == 1  # the last to finish puts it together
    parts = sorted(line.removeprefix(f"{shared}: ") for line in said if "47 tensors" not in line)
    assert [part.split(":")[0] for part in parts] == sorted({part.split(":")[0] for part in parts})
    assert all(part.startswith("part ") and "/4: 0 files" not in part for part in parts)
    code, _, err = finish(command(box, "mbfn.convert", *what, f"out={alone}"))
    assert (code, err) == (0, "")
    files = [{file.name: file.read_bytes() for file in out.glob("*.distcp")} for out in (shared, alone)]
    assert len(files[0]) > 4
    assert files[0] == files[1]


def test_a_requeued_step_goes_on(box: Box, hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    what = (f"hf={hf_dir}", "parallel=tp2pp2", FILES, f"out={out}")
    first = convert(box, ("--ntasks=1",), *what, "part=0/2")  # of two shares one came through before the job ended
    assert "part 0/2" in first
    assert not out.exists()
    said = convert(box, ("--nodes=2", "--ntasks=2"), *what)
    assert "files kept from an earlier run" in said
    code, printed, err = finish(command(box, "mbfn.verify", f"hf={hf_dir}", f"megatron={out}"))
    assert (code, err) == (0, ""), printed
    assert "bitwise equal" in printed
