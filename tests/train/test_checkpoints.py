"""Which checkpoints an output directory has, and which a run may continue."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mbfn.config.run import RunConfig
from mbfn.config.train import CheckpointConfig
from mbfn.errors import CheckpointError
from mbfn.train.checkpoints import (
    check_record,
    checkpoint_path,
    checkpoint_to_resume,
    complete_checkpoints,
    prune,
    run_record,
)
from tests.data.runs import make_run

RUN = make_run(Path("unused"))


def saved(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint_path(root, step).mkdir(parents=True)
        (checkpoint_path(root, step) / "metadata.json").write_text("{}")


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    saved(tmp_path, 5, 100, 20)
    for other in (".step_00000200.partial", ".dropped_step_00000300", "step_final", "notes"):
        (tmp_path / other).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000005", "step_00000020", "step_00000100"]
    assert checkpoint_to_resume(RUN, tmp_path) == tmp_path / "step_00000100"
    assert checkpoint_to_resume(RUN, tmp_path / "none") is None


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / ".dropped_step_00000000").mkdir()
    prune(tmp_path, 2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    prune(tmp_path, 2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_never_resuming_does_not_mix_runs(tmp_path: Path) -> None:
    never = replace(RUN, checkpoint=CheckpointConfig(resume="never"))
    assert checkpoint_to_resume(never, tmp_path) is None
    saved(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"checkpoint.resume: never, but .* holds step_00000007; choose another"):
        checkpoint_to_resume(never, tmp_path)


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
    check_record(record, changed(steps=50, micro_batch_size=4, eval_interval=3), "text", Path("step_00000003"))
