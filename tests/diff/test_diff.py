"""`python -m mbfn.diff` on overrides, files, run directories, recipes and git revisions, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbfn.config import to_yaml
from mbfn.config.compose import compose

ROOT = Path(__file__).parents[2]
IDENTITY = {f"GIT_{who}_{what}": "someone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def diff(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mbfn.diff", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def values(*arguments: str, cwd: Path = ROOT) -> Any:
    done = diff(*arguments, "format=json", cwd=cwd)
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def git(repo: Path, *arguments: str) -> str:
    env = os.environ | IDENTITY
    return subprocess.run(["git", "-C", repo, *arguments], capture_output=True, text=True, check=True, env=env).stdout


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three commits of this code: as it is; a default and a recipe changed; a comment changed."""
    path = tmp_path_factory.mktemp("repo")
    for part in ("mbfn", "conf", "experiments"):
        shutil.copytree(ROOT / part, path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (path / "experiments").glob("*.yaml"):
        if not recipe.name.startswith("llama31_8b"):  # a few are enough, and each is composed at every revision
            recipe.unlink()
    git(path, "init", "-q")
    commits = [
        {},
        {
            "mbfn/config/optim.py": ("beta2: float = 0.95", "beta2: float = 0.99"),
            "conf/parallel/pp2dp2.yaml": ("pp: 2", "pp: 4"),
        },
        {"mbfn/config/optim.py": ("from __future__", "# a comment\nfrom __future__")},
    ]
    for number, edits in enumerate(commits):
        for name, (old, new) in edits.items():
            text = (path / name).read_text()
            assert old in text
            (path / name).write_text(text.replace(old, new, 1))
        if number == 1:
            (path / "experiments/of_mine.yaml").write_text(
                "# @package _global_\ndefaults:\n  - override /parallel: pp2dp2\n"
            )
        git(path, "add", "-A")
        git(path, "commit", "-q", "-m", f"commit {number}")
    return path


def test_override_lists_differ_by_effect() -> None:
    done = diff("model=llama31_8b", "model=llama31_8b parallel=tp2 optim.lr=1e-4 log.interval=5")
    assert done.returncode == 3
    lines = [line.strip().split("  ")[0] for line in done.stdout.splitlines()]
    order = [lines.index(text) for text in ("numerics", "optim.lr", "memory", "parallel.tp", "bookkeeping", "derived")]
    assert order == sorted(order)
    assert "world_size" in lines
    assert "fields are equal" in done.stdout


def test_layout_alone_is_no_numerics() -> None:
    (found,) = values("model=llama31_8b", "model=llama31_8b parallel=tp2pp2")
    assert not found["numerics"]
    assert {change["path"] for change in found["changes"]} >= {"parallel.tp", "parallel.pp"}
    world = next(derived for derived in found["derived"] if derived["name"] == "world_size")
    assert (world["before"], world["after"]) == (1, 4)
    assert diff("model=llama31_8b", "model=llama31_8b parallel=tp2pp2").returncode == 0


def test_equal_runs_are_unchanged() -> None:
    done = diff("", "model=llama_tiny")
    assert (done.returncode, done.stdout) == (0, "unchanged: defaults -> model=llama_tiny\n")


def test_a_run_directory_a_file_and_a_recipe(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "mine.yaml"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(compose("model=qwen3_tiny", "train.seed=7")))
    recipe.write_text("# @package _global_\ndefaults:\n  - override /model: qwen3_tiny\ntrain:\n  seed: 8\n")
    (found,) = values(str(run), str(recipe))
    assert [(change["path"], change["before"], change["after"]) for change in found["changes"]] == [
        ("train.seed", 7, 8)
    ]
    (same,) = values(str(run), str(run / "config.yaml"))
    assert not same["changes"]


def test_markdown_is_a_table() -> None:
    done = diff("model=llama_tiny", "train.seed=5", "format=md")
    assert "| numerics | `train.seed` | `1234` | `5` | x0.00405 |" in done.stdout
    assert "**Numerics change**" in done.stdout


def test_revisions_compose_with_their_own_code(repo: Path) -> None:
    found = {item["name"]: item for item in values("HEAD~2", "HEAD", cwd=repo)}
    assert found["experiment=of_mine"]["status"] == "new"
    changes = {change["path"]: change for change in found["defaults"]["changes"]}
    assert changes.keys() == {"optim.beta2"}
    assert (changes["optim.beta2"]["before"], changes["optim.beta2"]["after"]) == (0.95, 0.99)
    assert diff("HEAD~2", "HEAD", cwd=repo).returncode == 3
    text = diff("HEAD~2", "HEAD", cwd=repo).stdout
    assert text.count("optim.beta2") == 1
    assert "the same in: experiment=" in text


def test_a_comment_changes_nothing(repo: Path) -> None:
    done = diff("HEAD~1", "HEAD", cwd=repo)
    assert done.returncode == 0
    assert done.stdout.startswith("unchanged: defaults, experiment=")


def test_one_configuration_of_two_revisions(repo: Path) -> None:
    (found,) = values("HEAD~2", "HEAD", "parallel=pp2dp2", cwd=repo)
    assert {change["path"] for change in found["changes"]} == {"optim.beta2", "parallel.pp"}


def test_the_working_tree_against_a_revision(repo: Path) -> None:
    file = repo / "conf/optim/adamw.yaml"
    before = file.read_text()
    try:
        file.write_text(before + "\nclip_grad: 0.5\n")
        found = values("HEAD", ".", cwd=repo)
    finally:
        file.write_text(before)
    assert {change["path"] for change in found[0]["changes"]} == {"optim.clip_grad"}


def test_a_revision_that_no_longer_composes_fails(repo: Path) -> None:
    file = repo / "conf/optim/adamw.yaml"
    before = file.read_text()
    try:
        file.write_text(before + "\nclip_grat: 0.5\n")
        done = diff("HEAD", ".", cwd=repo)
    finally:
        file.write_text(before)
    assert done.returncode == 1
    assert "optim.clip_grat: no such field; did you mean 'optim.clip_grad'?" in done.stdout


def test_two_commits_of_this_repository() -> None:
    commits = subprocess.run(
        ["git", "-C", ROOT, "log", "--format=%h", "-n", "2", "--", "conf", "mbfn/config"],
        capture_output=True,
        text=True,
    ).stdout.split()
    if len(commits) < 2:
        pytest.skip("this checkout has no history")
    done = diff(commits[1], commits[0])
    assert done.returncode in (0, 3), done.stderr
    assert "unchanged" in done.stdout or "defaults" in done.stdout


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        (("nowhere", "HEAD"), "error: nowhere: expected a git revision, a directory with a config.yaml, a YAML file, "),
        (("model=llama_tiny", "model=llama_tini"), "error: model: no option 'llama_tini'; did you mean 'llama_tiny'?"),
        (("", "", "format=yaml"), "error: format: expected one of text, md, json, got 'yaml'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(sides: tuple[str, ...], said: str) -> None:
    done = diff(*sides)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: [1\n")
    assert diff(str(path), "").stderr.startswith(f"error: {path}: expected YAML, found ")
    path.write_text("modell: {}\n")
    assert f"{path}: model: is required" in diff(str(path), "").stderr.replace("modell", "")


def test_help_teaches_with_three_examples() -> None:
    assert diff("--help").stdout.count("  python -m mbfn.diff ") == 3


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from mbfn.diff.__main__ import main; main(['', 'model=llama_tiny']); "
        "print(sorted({'torch', 'megatron', 'transformers', 'jax', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_pre_commit_hook_stops_a_change_of_numerics(repo: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    program, *arguments = hook["entry"].split()
    assert program == "python"
    assert re.match(hook["files"], "experiments/llama3_8b_pretrain.yaml")
    file = repo / "conf/optim/adamw.yaml"
    before = file.read_text()
    codes = []
    for addition in ("", "\nweight_decay: 0.2\n"):
        file.write_text(before + addition)
        done = subprocess.run([sys.executable, *arguments], cwd=repo, capture_output=True, check=False)
        codes.append(done.returncode)
    file.write_text(before)
    assert codes == [0, 3]


def test_the_workflows_command_runs(repo: Path) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/config-diff.yml").read_text())
    (step,) = (step for step in workflow["jobs"]["diff"]["steps"] if step.get("id") == "diff")
    script = step["run"].replace("${{ github.event.pull_request.base.sha }}", "HEAD~2")
    files = {name: str(repo.parent / name) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **files, "PATH": path}
    subprocess.run(["bash", "-e", "-c", script], cwd=repo, env=env, check=True)
    assert Path(files["GITHUB_OUTPUT"]).read_text() == "code=3\n"
    assert "| numerics | `optim.beta2` |" in Path(files["GITHUB_STEP_SUMMARY"]).read_text()
