"""`resume=DIR`: a run taken up from what its directory records, and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbfn.config.build import build
from mbfn.config.diff import difference
from mbfn.config.groups import ENV, conf_dir
from mbfn.config.run import RunConfig
from mbfn.config.schema import to_dict
from mbfn.errors import ConfigError

WORD = "resume="
NAME = "resumed"  # of the primary file that is made of a record


def directory_of(arguments: Sequence[str]) -> Path | None:
    """The run directory that `resume=DIR` names, if the command line has it."""
    given = [text.removeprefix(WORD) for text in arguments if text.startswith(WORD)]
    if not given:
        return None
    if len(given) > 1 or not given[0]:
        raise ConfigError([("resume", "expected one run directory: resume=DIR")])
    if any(text in ("-m", "--multirun") or text.startswith("hydra.run.dir=") for text in arguments):
        raise ConfigError([("resume", f"the run goes on in {given[0]}: no multirun, no hydra.run.dir")])
    return Path(os.path.abspath(Path(given[0]).expanduser()))


def recorded_run(directory: Path) -> RunConfig:
    """The configuration that a run directory records.

    Raises: ConfigError where there is none, or one that this version does not read.
    """
    file = directory / "config.yaml"
    try:
        return build(RunConfig, _tree(file))
    except ConfigError as error:
        raise ConfigError([(path or "resume", text) for path, text in error.problems]) from None


@contextmanager
def recorded_arguments(directory: Path, arguments: Sequence[str]) -> Iterator[list[str]]:
    """The command line that composes the recorded run, with what else was asked for on top. For `hydra_main`.

    A group that the command line chooses anew, such as `parallel=tp2`, is left out of the record.
    """
    import yaml

    asked = [text for text in arguments if not text.startswith(WORD)]
    tree = to_dict(recorded_run(directory))
    chosen = {text.partition("=")[0].lstrip("+") for text in asked}
    kept = {name: value for name, value in tree.items() if name not in chosen}
    primary = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    with tempfile.TemporaryDirectory(prefix="mbfn-resume-") as scratch:
        text = yaml.safe_dump({**primary, **kept}, sort_keys=False)
        (Path(scratch) / f"{NAME}.yaml").write_text(f"# {directory}\n{text}")
        with _searched(scratch):
            yield [*asked, f"hydra.run.dir={directory}"]


def refuse_contradiction(directory: Path, before: RunConfig, run: RunConfig) -> None:
    """Refuse to go on with another computation than the recorded one. Its layout, its cluster and its logs may change.

    More steps are the same run where the learning rate does not follow their number.
    Raises: ConfigError with every field that contradicts the record.
    """
    plain = to_dict(before)
    changes = difference(plain, to_dict(run), {}, {}).changes
    fixed = before.schedule.decay_steps or before.schedule.decay == "constant"
    problems = [
        (
            change.path,
            f"{directory} has {change.before}, this asks for {change.after}; leave it out or start another run",
        )
        for change in changes
        if change.effect == "numerics" and not (change.path == "train.steps" and fixed)
    ]
    if problems:
        raise ConfigError(problems)


def _tree(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no YAML"
        raise ConfigError([("resume", f"{file}: {reason}; expected the directory of a run")]) from None
    if not isinstance(found, dict):
        raise ConfigError([("resume", f"{file}: expected the configuration of a run")])
    return found


@contextmanager
def _searched(place: str) -> Iterator[None]:
    """`place` among the directories of configuration groups."""
    before = os.environ.get(ENV)
    os.environ[ENV] = os.pathsep.join(filter(None, (before, place)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENV]
        else:
            os.environ[ENV] = before
