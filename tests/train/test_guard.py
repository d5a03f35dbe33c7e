"""Steps whose loss is no number or jumps: judged before their update, left out or gone back from, and resumable."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbfn.train.step as steps
from mbfn import megatron
from mbfn.config.guard import GuardConfig, OnFault
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import CheckpointConfig, LogConfig
from mbfn.data import open_dataset
from mbfn.errors import TrainingError
from mbfn.train.guard import Guard, find_fault, learned, response, rolled_back
from mbfn.train.job import Job, run_job
from mbfn.train.record import read_records
from tests.data.runs import mock_run
from tests.megatron.snapshots import state_bytes
from tests.ranks import run_ranks

SPIKES = GuardConfig(on_spike="skip", spike_window=4, spike_threshold=3.0)
STEADY = Guard(losses=(2.0, 2.1, 1.9, 2.0))


@pytest.mark.parametrize(
    ("guard", "loss", "norm", "fault"),
    [
        (Guard(), math.nan, None, "nan"),
        (Guard(), math.inf, 1.0, "nan"),
        (Guard(), 2.0, math.nan, "nan"),
        (Guard(), 1e9, 1.0, ""),  # nothing to compare with yet
        (STEADY, 2.2, 1.0, ""),
        (STEADY, 2.3, 1.0, "spike"),
        (STEADY, 0.1, 1.0, ""),  # a drop is none
    ],
)
def test_what_a_fault_is(guard: Guard, loss: float, norm: float | None, fault: str) -> None:
    assert find_fault(SPIKES, guard, loss, norm) == fault
    assert find_fault(replace(SPIKES, on_spike="ignore"), guard, loss, norm) == fault.replace("spike", "")


def test_faults_end_the_run_when_there_are_too_many() -> None:
    config = GuardConfig(on_nan="skip", on_spike="roll_back", max_skips=2, max_roll_backs=1)
    assert [response(config, Guard(skips=skips), "nan") for skips in range(3)] == ["skip", "skip", "stop"]
    assert [response(config, Guard(roll_backs=ways), "spike") for ways in range(2)] == ["roll_back", "stop"]
    assert learned(config, Guard(skips=2), 1.0).skips == 0


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 9), st.integers(0, 9))
def test_the_batch_after_the_fault_comes_next(restored: int, more: int, now: int, then: int) -> None:
    step = restored + more
    guard = rolled_back(Guard(shift=now), step, Guard(shift=then, losses=(1.0,)), restored)
    assert restored + guard.shift == step + now + 1
    assert (guard.losses, guard.roll_backs) == ((1.0,), 1)


def refused(run: RunConfig) -> tuple[bool, bool, str]:
    """Whether a refused step changed bytes, whether the step after it did, and the fault."""
    with megatron.open_world(run.parallel, device="cpu") as world:
        models = megatron.build(run, world, None)
        batch = steps.read_batch(open_dataset(run).train, run, 0, world.coordinates.dp)
        megatron.train_step(run, world, models, batch, lr=1e-2)
        before = state_bytes(models)
        result = megatron.train_step(
            run, world, models, batch, lr=1e-2, judge=lambda loss, norm: "" if norm is None else "spike"
        )
        after = state_bytes(models)
        megatron.train_step(run, world, models, batch, lr=1e-2)
        assert result.grad_norm > 0
        return before != after, after != state_bytes(models), result.fault


@pytest.mark.parametrize("overlap", [False, True])
def test_a_refused_update_leaves_every_byte(overlap: bool) -> None:
    run = replace(mock_run(), parallel=ParallelConfig(dp=2))
    optim = replace(run.optim, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    assert run_ranks(2, refused, replace(run, optim=optim)) == [(False, True, "spike")] * 2


STEPS, BAD = 12, 7


def guarded(on_nan: OnFault) -> RunConfig:
    return replace(
        mock_run(steps=STEPS, eval_interval=0),
        checkpoint=CheckpointConfig(interval=3, keep_last=9, export_hf=False, async_save=False),
        guard=GuardConfig(on_nan=on_nan),
        log=LogConfig(curve=False, progress=False, sample_prompt=""),
    )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that runs read from now on; that of number BAD makes the loss NaN."""
    read, seen = steps.read_batch, list[int]()

    def read_batch(split: Any, run: RunConfig, number: int, rank: int) -> Any:
        seen.append(number)
        batch = read(split, run, number, rank)
        if number != BAD:
            return batch
        return tuple({**micro, "loss_mask": micro["loss_mask"] * math.nan} for micro in batch)

    monkeypatch.setattr(steps, "read_batch", read_batch)
    return seen


def stop_at(output: Path, step: int) -> Callable[[], int]:
    """A stop that comes after `step` is recorded."""
    return lambda: signal.SIGTERM if any(r["step"] == step for r in read_records(output / "metrics.jsonl")) else 0


def train(run: RunConfig, output: Path, stop: Callable[[], int] = lambda: 0) -> int:
    output.mkdir(exist_ok=True)
    return run_job(Job(run=run, output_dir=output), stop)


def shown(output: Path) -> list[tuple[float | None, ...]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_records(output / "metrics.jsonl")]


def events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]


def test_stop_names_the_step_and_keeps_the_checkpoints(tmp_path: Path, poisoned: list[int]) -> None:
    with pytest.raises(TrainingError) as error:
        train(guarded("stop"), tmp_path)
    assert str(error.value) == (
        "guard.on_nan: stop: the loss of step 8 is nan; no weights have taken it up; "
        "guard.on_nan=roll_back goes past the data of such steps"
    )
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000003", "step_00000006"]
    assert json.loads((tmp_path / "logs" / "rank_0.failure.json").read_text())["where"] == "step 8 (computing)"


def test_skip_leaves_the_batch_out(tmp_path: Path, poisoned: list[int]) -> None:
    assert train(guarded("skip"), tmp_path) == 0
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if record.get("skipped")] == [BAD + 1]
    assert records[BAD]["tokens"] == records[BAD - 1]["tokens"]
    assert all(math.isfinite(record["loss"] or 0) for record in records)


def test_roll_back_goes_past_the_data_and_resumes_the_same(tmp_path: Path, poisoned: list[int]) -> None:
    whole = tmp_path / "whole"
    assert train(guarded("roll_back"), whole) == 0
    assert events(whole) == [
        {"step": 8, "batch": 7, "event": "nan", "loss": None, "grad_norm": None, "response": "roll_back", "to": 6}
    ]
    assert [record["step"] for record in read_records(whole / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert max(poisoned) >= STEPS + 1  # two batches were passed over
    for cut in (7, 10):  # before the fault and after it
        output = tmp_path / f"cut{cut}"
        assert train(guarded("roll_back"), output, stop_at(output, cut)) == 75
        assert train(guarded("roll_back"), output) == 0
        assert shown(output) == shown(whole)
        assert events(output) == events(whole)
        assert weights(output) == weights(whole)


def weights(output: Path) -> bytes:
    files = sorted((output / "checkpoints" / f"step_{STEPS:08d}").glob("*.distcp"))
    return b"".join(file.read_bytes() for file in files)
