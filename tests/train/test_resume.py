"""Whole runs that are killed and taken up again: the same run, bit for bit, whatever the moment and the layout."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.storage import file_jobs, read_manifest
from mbfn.train.checkpoints import complete_checkpoints
from mbfn.train.record import read_records
from tests.ranks import RankError
from tests.train.sessions import MODEL, go, rank_of_run, same_checkpoints, session_run

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
    "dp2": ParallelConfig(dp=2),
    "tp2pp2": ParallelConfig(tp=2, pp=2),
}
_SLOW = pytest.mark.slow


def newest(output: Path) -> Path:
    return complete_checkpoints(output / "checkpoints")[-1]


def losses(output: Path) -> list[float]:
    return [record["loss"] or 0.0 for record in read_records(output / "metrics.jsonl")]


@pytest.mark.parametrize(
    "layout", ["dp2", *(pytest.param(name, marks=_SLOW) for name in ("tp1", "tp2", "pp2vpp2", "tp2pp2"))]
)
def test_killed_and_resumed_is_the_same_run(tmp_path: Path, layout: str) -> None:
    """Weights, optimizer, position and random numbers, byte for byte, saved beside the steps."""
    run = session_run(LAYOUTS[layout], steps=9, interval=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = go(run, whole)
    go(run, cut, kill_at=5)
    left = complete_checkpoints(cut / "checkpoints")
    assert left
    assert go(run, cut) == expected
    assert same_checkpoints(newest(cut), newest(whole))
    assert losses(cut) == losses(whole)
    manifests = [read_manifest(newest(output)) for output in (cut, whole)]
    for name in ("step", "tokens", "samples", "batch", "data", "config", "digest"):
        assert manifests[0][name] == manifests[1][name], name
    assert manifests[0]["samples"] == 9 * run.train.global_batch_size


@pytest.mark.slow
def test_layouts_follow_one_another(tmp_path: Path) -> None:
    """tp2pp2, then one rank, then dp4, in one run directory: the losses of a run at one layout, to rounding."""
    alone = session_run(ParallelConfig(), steps=9, export_hf=False)
    go(alone, tmp_path / "alone")
    for steps, parallel in ((3, LAYOUTS["tp2pp2"]), (6, ParallelConfig()), (9, ParallelConfig(dp=4))):
        part = session_run(parallel, steps=steps)
        fixed = replace(part, schedule=replace(part.schedule, decay_steps=9))
        go(fixed, tmp_path / "chain")
    assert losses(tmp_path / "chain") == pytest.approx(losses(tmp_path / "alone"), abs=5e-6)
    assert read_manifest(newest(tmp_path / "chain"))["samples"] == 9 * alone.train.global_batch_size


def test_a_flipped_bit_is_named_before_training(tmp_path: Path) -> None:
    run = session_run(LAYOUTS["dp2"], steps=3)
    go(run, tmp_path / "run")
    file = newest(tmp_path / "run") / "__1_0.distcp"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 16
    file.write_bytes(whole)
    longer = replace(run, train=replace(run.train, steps=5))
    with pytest.raises(RankError, match=rf"CheckpointError: {file}: bytes changed since it was written; copy it again"):
        go(longer, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    trusting = replace(longer, checkpoint=replace(run.checkpoint, verify="sizes"))
    assert [code for code, _ in go(trusting, tmp_path / "run")] == [0, 0]


def _on_a_small_disk(run: RunConfig, output: Path, limit: int) -> int:
    """A rank whose files are limited from its second checkpoint on; only for that one, where saves stop training."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    steps = 0

    def stop() -> int:
        nonlocal steps
        steps += 1
        if steps == 3:
            while not complete_checkpoints(output / "checkpoints"):
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if steps == 5 and not run.checkpoint.async_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return 0

    from mbfn.train.job import Job, run_job

    output.mkdir(parents=True, exist_ok=True)
    return run_job(Job(run=run, output_dir=output), stop)


@pytest.mark.parametrize("on_failure", ["continue", pytest.param("stop", marks=_SLOW)])
def test_a_full_disk_ends_the_run_or_leaves_it_without_that_checkpoint(tmp_path: Path, on_failure: str) -> None:
    from tests.ranks import run_ranks

    beside = on_failure == "stop"
    run = session_run(LAYOUTS["dp2"], steps=8, interval=2, keep_last=9, on_failure=on_failure, async_save=beside)
    if on_failure == "stop":
        with pytest.raises(RankError, match=r"CheckpointError: .*step_00000004: cannot write: .*the disk is full"):
            run_ranks(2, _on_a_small_disk, run, tmp_path / "run", 20_000)
        assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
        assert go(run, tmp_path / "run")[0][0] == 0
    else:
        assert run_ranks(2, _on_a_small_disk, run, tmp_path / "run", 20_000) == [0, 0]
    found = [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert ("step_00000004" in found) == (on_failure == "stop")
    assert {"step_00000002", "step_00000006", "step_00000008"} <= set(found)
    assert not any(job() for job in file_jobs(newest(tmp_path / "run")))
    assert len(losses(tmp_path / "run")) == 8


def test_the_best_checkpoints_stay(tmp_path: Path) -> None:
    run = session_run(ParallelConfig(), steps=12, eval_interval=2, interval=2, keep_last=1, keep_best=2, keep_every=6)
    go(run, tmp_path / "run")
    valid = {record["step"]: record["valid_loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")[1::2]}
    best = sorted(valid, key=lambda step: valid[step] or 0.0)[:2]
    steps = [read_manifest(path)["step"] for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == sorted({6, 12, *best})
    assert read_manifest(newest(tmp_path / "run"))["valid_loss"] == pytest.approx(valid[12])
    wider = replace(run, model=replace(MODEL, ffn_hidden_size=96))
    with pytest.raises(
        RankError, match=r"CheckpointError: model.ffn_hidden_size: .*step_00000012 was made with 80, this"
    ):
        go(wider, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "wanted"), [("tp1", 40), ("dp2", 10)])
def test_fifty_kills_while_checkpoints_are_written(tmp_path: Path, layout: str, wanted: int) -> None:
    """Every start finds a complete checkpoint; at most the one that was being written is lost."""
    interval, kills, torn = 2, 0, 0
    model = replace(MODEL, num_layers=2, vocab_size=20_000)
    run = session_run(LAYOUTS[layout], steps=10_000, interval=interval, model=model)
    output, draw, before = tmp_path / "run", random.Random(7), 0
    while kills < wanted:
        started = len(read_records(output / "metrics.jsonl"))
        _start_and_kill(run, output, started, draw.uniform(0.0, 0.5))
        kills += 1
        torn += bool(list((output / "checkpoints").glob(".*draft*")))
        done = int(read_records(output / "metrics.jsonl")[-1]["step"] or 0)
        complete = complete_checkpoints(output / "checkpoints")
        step = int(complete[-1].name.removeprefix("step_")) if complete else 0
        begun = done // interval * interval
        assert step >= max(before, begun - interval), (step, begun)
        assert not complete or not any(job() for job in file_jobs(complete[-1]))
        before = step
    print(json.dumps({"kills": kills, "while writing": torn, "step": before}))
    assert torn >= wanted // 5
    last = replace(run, train=replace(run.train, steps=before + 4), schedule=replace(run.schedule, decay_steps=10_000))
    go(last, output, timeout_s=300)
    go(last, tmp_path / "whole", timeout_s=300)
    assert same_checkpoints(newest(output), newest(tmp_path / "whole"))


def _start_and_kill(run: RunConfig, output: Path, started: int, after: float) -> None:
    """Kill every rank `after` seconds beyond the first new step."""
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=_alone, args=(run, output))
    parent.start()
    end = time.monotonic() + 300
    try:
        while len(read_records(output / "metrics.jsonl")) <= started:
            assert parent.is_alive()
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(after)
    finally:
        os.killpg(parent.pid or 0, signal.SIGKILL)
        parent.join()


def _alone(run: RunConfig, output: Path) -> None:
    os.setpgid(0, 0)  # so that one signal reaches all ranks at the same moment
    from tests.ranks import run_ranks

    run_ranks(run.parallel.world_size, rank_of_run, run, output, timeout_s=300)
