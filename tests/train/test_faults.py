"""Runs whose ranks fail in every way: all end in time, and the first line says which rank, where and why."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.train.command import SMALL, TORCHRUN, finish, records, start, wait_for_step

LOCAL = (*SMALL, "train.steps=5000", "parallel=dp2", "launch=local")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """The rank processes, in rank order."""
    found = [child for child in process.children(recursive=True) if "RANK" in child.environ()]
    return sorted((c for c in found if "mbfn" in " ".join(c.cmdline())), key=lambda c: int(c.environ()["RANK"]))


def sabotaged(monkeypatch: pytest.MonkeyPatch, kind: str, done: Path) -> None:
    """Let rank 1 of the run that starts from now on fail, until `done` says that it has."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'sabotage'}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.setenv("SABOTAGE", kind)
    monkeypatch.setenv("SABOTAGE_DONE", str(done))


def check_error(err: str, pattern: str) -> None:
    """The first line of `err` is the error."""
    first = err.splitlines()[0] if err else ""
    assert re.match(pattern, first), err


@pytest.mark.parametrize(
    "kind",
    ["backward", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("forward", "data"))],
)
def test_a_rank_that_raises_is_named_with_its_step(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    sabotaged(monkeypatch, kind, root / f"{kind}_done")
    code, _, err = finish(start(root / kind, *LOCAL), timeout=300)
    assert code == 1
    phase = "loading data" if kind == "data" else "computing"
    check_error(err, rf"error: rank 1, step \d+ \({phase}\): ValueError: sabotage in {kind}; logs: ")
    assert err.count("Traceback (most recent call last)") == 1


@pytest.mark.slow
def test_a_rank_that_cannot_save_is_named(root: Path) -> None:
    output = root / "save"
    process = start(output, *LOCAL, "checkpoint.interval=20")
    wait_for_step(process, output, 3)
    (output / "checkpoints").mkdir(exist_ok=True)
    (output / "checkpoints" / "step_00000020").write_text("in the way")
    code, _, err = finish(process, timeout=300)
    assert code == 1
    check_error(err, r"error: rank \d, step 2\d \(\w+\): .*step_00000020")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_run_by_its_name(root: Path, rank: int) -> None:
    output = root / f"stopped{rank}"
    process = start(output, *LOCAL)
    wait_for_step(process, output, 10)
    ranks = ranks_of(psutil.Process(process.pid))
    ranks[rank].suspend()
    stopped = time.monotonic()
    psutil.wait_procs([ranks[1 - rank]], timeout=60)
    assert not ranks[1 - rank].is_running()
    code, _, err = finish(process, timeout=30)
    print(f"the run was over {time.monotonic() - stopped:.0f} s after rank {rank} stopped")
    assert code == 1
    check_error(err, rf"error: rank {rank}, step \d+ \([a-z ]+\): no sign of life for \d+ s: its process has stopped")
    assert "Stack of the rank's main thread" in err
    assert not ranks[rank].is_running()


@pytest.mark.slow
def test_a_rank_that_hangs_in_loading_data_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged(monkeypatch, "hang", root / "hang_done")
    process = start(root / "hang", *LOCAL, "launch.hang_s=15")
    code, _, err = finish(process, timeout=300)
    assert code == 1
    check_error(
        err, r"error: rank 1, step 6 \(loading data\): no progress for \d+ s; the other ranks wait for it; logs: "
    )
    assert "next(batches, None)" in err


@pytest.mark.slow
def test_a_rank_that_is_only_slow_for_once_is_let_be(root: Path) -> None:
    output = root / "pause"
    process = start(output, *LOCAL, "train.steps=60", "launch.hang_s=20")
    wait_for_step(process, output, 10)
    rank = ranks_of(psutil.Process(process.pid))[1]
    rank.suspend()
    time.sleep(8)
    rank.resume()
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    assert len(records(output)) == 60


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_dies_is_named_with_its_step(root: Path, number: signal.Signals) -> None:
    output = root / number.name
    process = start(output, *LOCAL)
    wait_for_step(process, output, 10)
    ranks_of(psutil.Process(process.pid))[1].send_signal(number)
    began = time.monotonic()
    code, _, err = finish(process, timeout=120)
    print(f"the run was over {time.monotonic() - began:.0f} s after {number.name}")
    assert code == 1
    check_error(err, rf"error: rank 1, step \d+ \([a-z ]+\): ended by {number.name}; the other ranks were stopped")
    assert ("Fatal Python error: Segmentation fault" in err) == (number == signal.SIGSEGV)


@pytest.mark.slow
def test_a_failed_run_starts_again_from_its_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = (
        *SMALL,
        "train.steps=12",
        "parallel=dp2",
        "launch=local",
        "checkpoint.interval=2",
        "checkpoint.export_hf=false",
    )
    whole = root / "unbroken"
    assert finish(start(whole, *fixed))[0] == 0
    output = root / "again"
    sabotaged(monkeypatch, "backward", root / "once")
    code, _, err = finish(start(output, *fixed, "launch.max_restarts=1"))
    assert code == 0, err
    check_error(err, r"error: rank 1, step \d+ \(computing\): ValueError: sabotage in backward; logs: .*; start 2 of 2")
    assert records(output) == records(whole)
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["failure"]


@pytest.mark.slow
def test_torchrun_starts_a_failed_run_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = root / "torchrun"
    sabotaged(monkeypatch, "backward", root / "torchrun_once")
    fixed = (*SMALL, "train.steps=12", "parallel=dp2", "checkpoint.interval=2", "checkpoint.export_hf=false")
    code, _, err = finish(start(output, *fixed, prefix=(*TORCHRUN, "--max-restarts=1")))
    assert code == 0, err
    check_error(err, r"error: rank 1, step \d+ \(computing\): ValueError: sabotage in backward")
    assert [record["step"] for record in records(output)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_the_wall_clock_limit_saves_and_asks_to_be_started_again(root: Path, layout: str) -> None:
    output = root / f"limit_{layout}"
    launch = ("launch=local",) if layout != "single" else ()
    fixed = (*SMALL, f"parallel={layout}", *launch, "checkpoint.export_hf=false", "train.steps=100000")
    code, printed, err = finish(start(output, *fixed, "launch.stop_after_min=0.4"))
    assert (code, err) == (75, "")
    last = records(output)[-1]["step"]
    assert f"stopped after step {last}" in printed
    assert os.listdir(output / "checkpoints") == [f"step_{last:08d}"]
