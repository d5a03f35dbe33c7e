"""Multiruns as job arrays: each run once, in one place, with a table at the end; submitit's launchers still work."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

from tests.slurm.box import Box
from tests.slurm.client import ON_CPU, command, finish
from tests.train.command import SHORT, SMALL, losses

RATES = "optim.lr=1e-3,3e-3,1e-2"


def sweep(box: Box, place: Path, launcher: str, *overrides: str, **env: str) -> tuple[int, str, str]:
    short = [text for text in SHORT if not text.startswith("optim.lr=")]
    fixed = (f"hydra.sweep.dir={place}", f"data.cache={place.parent / 'cache'}", f"hydra/launcher={launcher}")
    ours = ON_CPU if launcher == "mbfn_slurm" else ("launch.device=cpu",)
    return finish(command(box, "mbfn.train", "-m", *short, *SMALL, *ours, *fixed, "train.steps=4", *overrides, **env))


def shown(box: Box, module: str, place: Path) -> list[str]:
    code, out, err = finish(command(box, module, str(place)))
    assert (code, err) == (0, "")
    return out.splitlines()


@pytest.fixture(scope="module")
def place(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps") / "rates"


@pytest.fixture(scope="module")
def swept(box: Box, place: Path) -> str:
    """Four runs as one array; what the client printed."""
    code, out, err = sweep(box, place, "mbfn_slurm", RATES + ",3e-2")
    assert (code, err) == (0, ""), out
    return out


def test_four_runs_are_one_array(swept: str, place: Path) -> None:
    assert "4 runs: 0 done, 0 in the queue, 4 to submit\n" in swept
    assert len(re.findall(r"^job \d+ submitted: 4 runs", swept, re.MULTILINE)) == 1
    assert len(re.findall(r"^optim\.lr=\S+: job \d+_[0-3]: COMPLETED$", swept, re.MULTILINE)) == 4
    runs = [path for path in place.iterdir() if (path / "run.json").exists()]
    assert len(runs) == 4
    assert all(re.fullmatch(r"[0-9a-f]{16}", path.name) and len(losses(path)) == 4 for path in runs)


def test_the_same_runs_are_not_started_twice(box: Box, swept: str, place: Path) -> None:
    code, out, err = sweep(box, place, "mbfn_slurm", RATES, "site.partition=second")
    assert (code, err) == (0, "")
    assert out == "3 runs: 3 done, 0 in the queue, 0 to submit\n"


def test_the_table_and_the_picture(box: Box, swept: str, place: Path) -> None:
    header, *lines = shown(box, "mbfn.sweep", place)
    assert header.split() == ["run", "optim.lr", "state", "job", "step", "loss", "held-out", "loss"]
    assert {line.split()[1] for line in lines[:4]} == {"0.001", "0.003", "0.01", "0.03"}
    assert [line.split()[2] for line in lines[:4]] == ["done"] * 4
    results = [float(line.split()[-1]) for line in lines[:4]]
    assert results == sorted(results)
    assert (place / "sweep.png").stat().st_size > 10_000
    assert len(list(csv.reader((place / "sweep.csv").open()))) == 5
    assert shown(box, "mbfn.status", place)[-1] == "4 runs: 4 done"


def test_a_run_that_fails_is_named_and_the_others_end(box: Box, place: Path) -> None:
    text = place.parent / "text.txt"
    text.write_text("one word after the other " * 4000)
    there = place.parent / "failing"
    code, _, err = sweep(box, there, "mbfn_slurm", f"data.path={text},{text}.none", "data.tokenizer=auto")
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines[0].startswith(f"error: data.path={text}.none: rank 0: "), lines
    assert lines[-1] == "error: 1 of 2 runs did not end well"
    rows = shown(box, "mbfn.status", there)
    assert rows[-1] == "2 runs: 1 done, 1 failed"
    assert any("failed" in row and "rank 0:" in row for row in rows)


def test_mistakes_are_found_before_anything_is_submitted(box: Box, place: Path) -> None:
    there = place.parent / "wrong"
    code, _, err = sweep(box, there, "mbfn_slurm", "parallel.dp=1,3")
    assert (code, list(there.glob("*/slurm"))) == (2, [])
    assert err.startswith("error: train.global_batch_size: 8 does not divide")
    code, out, _ = sweep(box, there, "mbfn_slurm", "train.seed=1,2", "parallel=single,dp2", "launch.dry_run=true")
    assert (code, list(there.glob("*/slurm"))) == (0, [])
    assert out.count("#SBATCH --array=0-1%2") == 2, "one array for each number of ranks"


@pytest.mark.slow
def test_detached_runs_are_not_submitted_again(box: Box, place: Path) -> None:
    there = place.parent / "detached"
    code, out, _ = sweep(box, there, "mbfn_slurm", "train.seed=1,2", "launch.detach=true", "site.sbatch_args=[--hold]")
    assert code == 0
    (job,) = re.findall(r"^job (\d+) submitted: 2 runs", out, re.MULTILINE)
    assert shown(box, "mbfn.status", there)[-1] == "2 runs: 2 pending"
    code, out, _ = sweep(box, there, "mbfn_slurm", "train.seed=1,2,3", "launch.detach=true")
    assert "3 runs: 0 done, 2 in the queue, 1 to submit\n" in out
    box.run("scancel", job)
    code, out, err = sweep(box, there, "mbfn_slurm", "train.seed=1,2,3")
    assert (code, err) == (0, ""), out
    assert shown(box, "mbfn.status", there)[-1] == "3 runs: 3 done"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "submitit_local", "submitit_slurm"])
def test_other_launchers_put_runs_in_the_same_places(box: Box, swept: str, place: Path, launcher: str) -> None:
    there = place.parent / launcher
    path = f"{Path(__file__).parent / 'bin'}:{os.environ['PATH']}"
    code, out, err = sweep(box, there, launcher, "optim.lr=1e-3,3e-3", PATH=path)
    assert code == 0, (out, err)
    made = {run.name for run in there.iterdir() if (run / "run.json").exists()}
    assert len(made) == 2
    assert made < {run.name for run in place.iterdir()}
    assert all(losses(there / name) == losses(place / name) for name in made)
