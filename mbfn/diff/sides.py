"""What A and B can be: git revisions, checkouts, run directories, YAML files, override lists."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mbfn.diff import snapshot as snapshots
from mbfn.diff.snapshot import Snapshot
from mbfn.errors import ConfigError

_PARTS = ("mbfn", "conf", "experiments")  # of a tree, what composes a configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two that are compared: a tree that composes any override list, or one configuration."""

    label: str
    tree: Path | None = None
    fixed: Snapshot | None = None

    def experiments(self) -> set[str]:
        """The recipes of the tree."""
        return {file.stem for file in (self.tree / "experiments").glob("*.yaml")} if self.tree else set()

    def snapshots(self, jobs: Sequence[Sequence[str]]) -> list[Snapshot | None]:
        """The configuration of each override list; none for a recipe that the tree does not have."""
        if self.tree is None:
            return [self.fixed] * len(jobs)
        known = self.experiments()
        has = [all(text.partition("=")[2] in known for text in job if "experiment=" in text) for job in jobs]
        made = iter(_run_in(self.tree, [job for job, there in zip(jobs, has, strict=True) if there], self.label))
        return [next(made) if there else None for there in has]


@contextmanager
def opened(text: str, extra: Sequence[str]) -> Iterator[Side]:
    """The side that `text` names; `extra` overrides go on top of an override list.

    Raises: ConfigError naming what A and B can be.
    """
    path = Path(text).expanduser()
    if text and path.is_dir() and (path / "conf/config.yaml").is_file() and (path / "mbfn").is_dir():
        yield Side(label=text, tree=path.resolve())
    elif text and path.is_dir() and (path / "config.yaml").is_file():
        yield Side(label=text, fixed=_file(path / "config.yaml"))
    elif path.is_file():
        yield Side(label=text, fixed=_file(path, extra))
    elif text == "" or "=" in text:
        yield Side(label=text or "defaults", fixed=_composed(*shlex.split(text), *extra))
    else:
        with tempfile.TemporaryDirectory(prefix="mbfn-diff-") as scratch:
            yield Side(label=text, tree=_archive(text, Path(scratch)))


def _composed(*overrides: str) -> Snapshot:
    from mbfn.public import compose

    return snapshots.of_run(compose(*overrides))


def _file(path: Path, extra: Sequence[str] = ()) -> Snapshot:
    """A resolved configuration, as runs leave it, or a recipe with a defaults list."""
    import yaml

    from mbfn.config.build import build
    from mbfn.config.run import RunConfig

    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected the fields of a run, found {type(tree).__name__}")
    if "defaults" in tree:
        return _recipe(path, extra)
    try:
        return snapshots.of_run(build(RunConfig, tree))
    except ConfigError as error:
        raise ConfigError(
            [(f"{path}: {where}" if where else str(path), said) for where, said in error.problems]
        ) from None


def _recipe(path: Path, extra: Sequence[str]) -> Snapshot:
    """A recipe from anywhere, as if it were in experiments/."""
    from mbfn.public import compose

    with tempfile.TemporaryDirectory(prefix="mbfn-diff-") as scratch:
        name = f"{path.stem}_of_this_file"
        (Path(scratch) / "experiment").mkdir()
        (Path(scratch) / "experiment" / f"{name}.yaml").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        return snapshots.of_run(compose(f"+experiment={name}", *extra, conf_dirs=[scratch]))


def _archive(revision: str, scratch: Path) -> Path:
    """The files of a git revision that compose configurations, without touching the checkout."""
    root = _git("rev-parse", "--show-toplevel")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if not root or not found:
        raise ConfigError(
            f"{revision}: expected a git revision, a directory with a config.yaml, a YAML file, "
            f"or overrides in quotes such as 'model=llama31_8b parallel=tp2'"
        )
    commit, top = found.decode().strip(), root.decode().strip()
    listed = _git("-C", top, "ls-tree", "--name-only", commit) or b""
    parts = [part for part in _PARTS if part in listed.decode().split()]
    with tarfile.open(fileobj=BytesIO(_git("-C", top, "archive", commit, *parts) or b"")) as files:
        files.extractall(scratch, filter="data")
    return scratch


def _run_in(tree: Path, jobs: Sequence[Sequence[str]], label: str) -> list[Snapshot]:
    """Snapshots by the code of `tree`, in a process of its own."""
    program = Path(snapshots.__file__).read_text(encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        input=json.dumps([list(job) for job in jobs]),
        capture_output=True,
        text=True,
        cwd=tree,
        env=env,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise ConfigError(f"{label}: expected its code to compose configurations, it ended with {said[0]}")
    made: list[Snapshot] = json.loads(done.stdout)
    return made


def _git(*arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
