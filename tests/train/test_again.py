"""`resume=DIR`: what a record gives back, and what a command line may add to it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbfn.config.compose import compose_as
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.config.schema import to_yaml
from mbfn.errors import ConfigError
from mbfn.train.again import NAME, directory_of, recorded_arguments, recorded_run, refuse_contradiction
from tests.data.runs import mock_run

RUN = replace(mock_run(steps=8), parallel=ParallelConfig(tp=2))


def recorded(directory: Path, *asked: str) -> RunConfig:
    """What the command line `resume=DIR` and `asked` composes."""
    (directory / "config.yaml").write_text(to_yaml(RUN))
    with recorded_arguments(directory, [f"resume={directory}", *asked]) as arguments:
        overrides = [text for text in arguments if not text.startswith("hydra.")]
        return compose_as(RunConfig, NAME, *overrides)


def test_the_record_alone_is_the_run(tmp_path: Path) -> None:
    assert recorded(tmp_path) == RUN
    assert recorded_run(tmp_path) == RUN


def test_fields_and_groups_go_on_top(tmp_path: Path) -> None:
    found = recorded(tmp_path, "parallel=pp2", "checkpoint.interval=7")
    assert found == replace(RUN, parallel=ParallelConfig(pp=2), checkpoint=replace(RUN.checkpoint, interval=7))
    refuse_contradiction(tmp_path, RUN, found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, ["train.seed: .* has 1234, this asks for 7"]),
        ({"seq_length": 8, "global_batch_size": 16}, ["train.global_batch_size: ", "train.seq_length: "]),
        ({"steps": 9}, ["train.steps: .* has 8, this asks for 9"]),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        refuse_contradiction(Path("run"), RUN, replace(RUN, train=replace(RUN.train, **changes)))
    lines = sorted(str(error.value).splitlines())
    assert len(lines) == len(named)
    for line, pattern in zip(lines, named, strict=True):
        assert re.match(pattern, line)


def test_more_steps_of_a_schedule_that_does_not_follow_them() -> None:
    fixed = replace(RUN, schedule=replace(RUN.schedule, decay_steps=8))
    refuse_contradiction(Path("run"), fixed, replace(fixed, train=replace(fixed.train, steps=20)))


def test_what_names_no_run_is_refused(tmp_path: Path) -> None:
    assert directory_of(["train.steps=3"]) is None
    assert directory_of(["resume=runs/a", "train.steps=3"]) == Path.cwd() / "runs" / "a"
    for arguments in (["resume="], ["resume=a", "resume=b"], ["resume=a", "-m"], ["resume=a", "hydra.run.dir=b"]):
        with pytest.raises(ConfigError, match="resume: "):
            directory_of(arguments)
    with pytest.raises(ConfigError, match=r"config.yaml: No such file or directory; expected the directory of a run"):
        recorded_run(tmp_path)
