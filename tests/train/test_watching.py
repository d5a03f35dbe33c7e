"""Trackers, profiler windows and the comparison of ranks, each read back from what it wrote."""

from __future__ import annotations

import gzip
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mbfn import megatron
from mbfn.config.parallel import ParallelConfig
from mbfn.config.profile import ProfileConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import LogConfig
from mbfn.errors import ConfigError, LaunchError
from mbfn.launch.check import check_launch
from mbfn.train.guard import Guard
from mbfn.train.profiler import profiled
from mbfn.train.state import Metrics, TrainState
from mbfn.train.stragglers import Own, comparing, find_stragglers
from mbfn.train.trackers import tracking
from tests.data.runs import mock_run
from tests.ranks import run_ranks

STATE = TrainState(step=0, tokens=0, models=None, guard=Guard())  # type: ignore[arg-type]


def metrics(step: int, **changes: float) -> Metrics:
    fields: dict[str, Any] = {"loss": 4.0 / step, "grad_norm": 0.5, "lr": 1e-3, "tokens": 64 * step, "update_s": 0.1}
    return Metrics(step=step, **fields | changes)


def tracked_run(name: Literal["tensorboard", "wandb", "mlflow"], **log: Any) -> RunConfig:
    return replace(mock_run(), log=LogConfig(trackers=(name,), **log))


def track(run: RunConfig, output: Path, *steps: int) -> list[str]:
    """Hand over metrics; the warnings."""
    warnings: list[str] = []
    output.mkdir(exist_ok=True)
    with tracking(run, output, steps[0] - 1, warnings.append) as observe:
        for step in steps:
            observe(STATE, metrics(step, **({"valid_loss": 3.0} if step == 2 else {})))
    return warnings


def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track(tracked_run("tensorboard"), tmp_path, 1, 2, 3) == []
    assert track(tracked_run("tensorboard"), tmp_path, 3, 4) == []  # resumed after step 2
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (step, pytest.approx(4.0 / step)) for step in (1, 2, 3, 4)
    ]
    assert [event.step for event in found.Scalars("valid/loss")] == [2]


def test_mlflow_has_the_figures_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    assert track(tracked_run("mlflow"), tmp_path, 1, 2) == []
    assert track(tracked_run("mlflow"), tmp_path, 3) == []
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    history = client.get_metric_history((tmp_path / "mlflow_run").read_text(), "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 4.0), (2, 2.0), (3, 4.0 / 3)]


@pytest.mark.slow
def test_wandb_records_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    assert track(tracked_run("wandb"), tmp_path, 1, 2) == []
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 30
    while b"train/loss" not in record.read_bytes():  # a process of its own writes it
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_tracker_that_cannot_start_says_so_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(LaunchError, match=r"^log.trackers: mlflow cannot start: .*; mend that, or leave it out$"):
        track(tracked_run("mlflow", mlflow_uri="nowhere://host"), tmp_path, 1)


def test_what_is_missing_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(
            LaunchError, match=r"^log.trackers: tensorboard is not installed; `pip install tensorboard`"
        ):
            check_launch(tracked_run("tensorboard"), None, 0)
    pytest.importorskip("wandb")
    with pytest.raises(LaunchError, match=r"^log.online: WANDB_API_KEY is not set; export it, or"):
        check_launch(tracked_run("wandb", online=True), None, 0)
    with pytest.raises(
        LaunchError, match=r"^profile.kind: memory records CUDA, this run is on CPU; profile=torch runs"
    ):
        check_launch(replace(mock_run(steps=20), profile=ProfileConfig(kind="memory")), None, 0)
    with pytest.raises(ConfigError, match=r"profile.start: steps 10 to 12 are beyond train.steps=4"):
        replace(mock_run(), profile=ProfileConfig(kind="torch"))
    with pytest.raises(ConfigError, match=r"profile.ranks: 1 is not among the 1 ranks of the layout"):
        replace(mock_run(steps=20), profile=ProfileConfig(kind="torch", ranks=(1,)))


def test_the_profiler_sees_its_window_alone(tmp_path: Path) -> None:
    run = replace(mock_run(steps=9), profile=ProfileConfig(kind="torch", start=3, steps=2))
    with (
        megatron.open_world(run.parallel, device="cpu") as world,
        profiled(run, world, tmp_path, 0) as observe,
    ):
        for step in range(1, 7):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(4) @ torch.ones(4)
            observe(STATE, metrics(step))
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "rank_0.trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"step {step}" for step in range(1, 7)} & names == {"step 3", "step 4"}


def test_slow_ranks_stand_out() -> None:
    own = [Own(data_s=0.001, products_s=0.010) for _ in range(6)]
    own[2], own[4] = Own(data_s=0.030, products_s=0.010), Own(data_s=0.0016, products_s=0.019)
    hosts = [f"node{rank // 2}" for rank in range(6)]
    found = find_stragglers(own, hosts, step_s=0.1)
    assert [str(one) for one in found] == [
        "rank 2 on node1 waits for its data 30.0 ms, the median rank 1.0 ms",
        "rank 4 on node2 takes for a few matrix products 19.0 ms, the median rank 10.0 ms",
    ]


def compared(run: RunConfig) -> list[tuple[int, list[str], list[float]]]:
    reports: list[tuple[int, list[str], list[float]]] = []

    def report(step: int, found: list[Any], figures: dict[str, Any]) -> None:
        slow = [f"{one.rank} {one.what}" for one in found if one.what == "data_s"]
        reports.append((step, slow, figures["data_s"]))

    with megatron.open_world(run.parallel, device="cpu") as world:
        observe = comparing(world, 2, report)
        for step in range(1, 6):
            observe(STATE, metrics(step, data_s=0.05 if world.rank == 1 else 0.001))
    return reports


def test_ranks_are_compared_at_the_interval() -> None:
    run = replace(mock_run(), parallel=ParallelConfig(dp=2))
    first, other = run_ranks(2, compared, run)
    assert first == [(2, ["1 data_s"], [0.001, 0.05]), (4, ["1 data_s"], [0.001, 0.05])]
    assert other == []
