"""Which checkpoints an output directory has, and which a run may continue."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbfn.config.run import RunConfig
from mbfn.config.train import CheckpointConfig
from mbfn.errors import CheckpointError, ConfigError
from mbfn.train.checkpoints import (
    check_record,
    checkpoint_path,
    checkpoint_to_resume,
    complete_checkpoints,
    kept,
    prune,
    run_record,
    skipped_checkpoints,
)
from tests.data.runs import make_run

RUN = make_run(Path("unused"))


def saved(root: Path, *steps: int, losses: dict[int, float] | None = None) -> None:
    for step in steps:
        path = checkpoint_path(root, step)
        path.mkdir(parents=True)
        (path / "metadata.json").write_text("{}")
        (path / "__0_0.distcp").write_bytes(b"weights")
        manifest = {"files": {"metadata.json": 2, "__0_0.distcp": 7}, "valid_loss": (losses or {}).get(step)}
        (path / "mbfn.json").write_text(json.dumps(manifest))


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    saved(tmp_path, 5, 100, 20)
    for other in (".step_00000200.partial", ".dropped_step_00000300", "step_final", "notes"):
        (tmp_path / other).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000005", "step_00000020", "step_00000100"]
    assert checkpoint_to_resume(RUN, tmp_path) == tmp_path / "step_00000100"
    assert checkpoint_to_resume(RUN, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda path: (path / "mbfn.json").unlink(), r"mbfn.json: cannot be read"),
        (lambda path: (path / "__0_0.distcp").unlink(), r"__0_0.distcp: No such file"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"wei"), r"__0_0.distcp: expected 7 bytes, found 3"),
        (lambda path: (path / "mbfn.json").write_text("{"), r"mbfn.json: cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, fault: Callable[[Path], None], said: str) -> None:
    saved(tmp_path, 5, 7)
    fault(checkpoint_path(tmp_path, 7))
    resumed = checkpoint_to_resume(RUN, tmp_path)
    assert resumed == checkpoint_path(tmp_path, 5)
    (line,) = skipped_checkpoints(tmp_path, resumed)
    assert re.search(said, line)


def test_a_checkpoint_of_another_run_is_for_an_empty_directory(tmp_path: Path) -> None:
    saved(tmp_path / "other" / "checkpoints", 3, 4)
    for named in (tmp_path / "other", tmp_path / "other" / "checkpoints" / "step_00000004"):
        run = replace(RUN, checkpoint=CheckpointConfig(resume=str(named)))
        assert checkpoint_to_resume(run, tmp_path / "own") == tmp_path / "other" / "checkpoints" / "step_00000004"
    saved(tmp_path / "own", 9)
    assert checkpoint_to_resume(run, tmp_path / "own") == checkpoint_path(tmp_path / "own", 9)
    nowhere = replace(RUN, checkpoint=CheckpointConfig(resume=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match=r"checkpoint.resume: .*nowhere: neither a Megatron checkpoint nor a run"):
        checkpoint_to_resume(nowhere, tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "stay"),
    [
        (CheckpointConfig(keep_last=2), {50, 60}),
        (CheckpointConfig(keep_last=1, interval=10, keep_every=20), {20, 40, 60}),
        (CheckpointConfig(keep_last=1, keep_best=2), {30, 50, 60}),
        (CheckpointConfig(keep_last=9), {10, 20, 30, 40, 50, 60}),
    ],
)
def test_what_is_kept(tmp_path: Path, config: CheckpointConfig, stay: set[int]) -> None:
    losses = {10: 3.0, 20: 2.9, 30: 2.5, 40: float("nan"), 50: 2.7}
    assert kept([(step, losses.get(step)) for step in range(10, 70, 10)], config) == stay
    saved(tmp_path, *range(10, 70, 10), losses=losses)
    (tmp_path / ".dropped_step_00000000").mkdir()
    for _ in range(2):
        prune(tmp_path, config)
        assert names(tmp_path) == [f"step_{step:08d}" for step in sorted(stay)]


def test_never_resuming_does_not_mix_runs(tmp_path: Path) -> None:
    never = replace(RUN, checkpoint=CheckpointConfig(resume="never"))
    assert checkpoint_to_resume(never, tmp_path) is None
    saved(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"checkpoint.resume: never, but .* holds step_00000007; choose another"):
        checkpoint_to_resume(never, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": 4, "keep_every": 6}, "keep_every: 6 is no multiple of interval=4, so no checkpoint falls on it"),
        ({"keep_every": 6}, "keep_every: 6 is no multiple of interval=0"),
        ({"keep_last": 0}, "keep_last: expected at least 1, got 0"),
        ({"interval": 3, "keep_best": 1}, "checkpoint.keep_best: needs a held-out loss at each checkpoint; set "),
        ({"resume": ""}, "resume: expected auto, never or a directory, got nothing"),
    ],
)
def test_what_would_never_be_kept_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(RUN, checkpoint=CheckpointConfig(**fields), train=replace(RUN.train, eval_interval=2))


def changed(**train: int) -> RunConfig:
    return replace(RUN, train=replace(RUN.train, **train))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "data", "field"),
    [
        (changed(seed=5), "text", "train.seed"),
        (changed(seq_length=32), "text", "train.seq_length"),
        (changed(global_batch_size=16), "text", "train.global_batch_size"),
        (replace(RUN, model=replace(RUN.model, rotary_base=5e5)), "text", "model.rotary_base"),
        (RUN, "other text", "data"),
    ],
)
def test_another_run_is_not_continued(now: RunConfig, data: str, field: str) -> None:
    record = run_record(RUN, "text", 3, 96)
    with pytest.raises(CheckpointError) as error:
        check_record(record, now, data, Path("step_00000003"))
    assert str(error.value).startswith(f"{field}: step_00000003 was made with ")
    assert "\n" not in str(error.value)


def test_a_longer_run_of_the_same_kind_is_continued() -> None:
    record = run_record(RUN, "text", 3, 96)
    now = changed(steps=50, micro_batch_size=4, eval_interval=3)
    before, after = RUN.train.steps, now.train.steps
    said = check_record(record, now, "text", Path("step_00000003"))
    assert said == [f"train.steps: was {before} up to here, is {after} from now on"]
