"""An installed mbfn finds its configuration files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mbfn.config import to_yaml
from mbfn.config.compose import compose
from mbfn.config.groups import conf_dir, experiments_dir

ROOT = Path(__file__).parents[2]

COMPOSE = """
from mbfn.config import to_yaml
from mbfn.config.compose import compose
from mbfn.config.groups import conf_dir
print(conf_dir())
print(to_yaml(compose("model=llama31_70b", "parallel=tp8pp4")), end="")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built wheel, unpacked as an installer does it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in ("mbfn", "hydra_plugins", "conf", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    (source / "README.md").write_text("mbfn\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    subprocess.run([*command, "-w", str(place)], cwd=source, check=True, timeout=120)
    (wheel,) = place.glob("mbfn-*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    shutil.rmtree(source)
    return place / "site"


def test_every_configuration_file_is_in_the_wheel(installed: Path) -> None:
    for ours, name in ((conf_dir(), "conf"), (experiments_dir(), "experiments")):
        packed = {path.relative_to(installed / "mbfn" / name) for path in (installed / "mbfn" / name).rglob("*.yaml")}
        assert packed == {path.relative_to(ours) for path in ours.rglob("*.yaml")}


def test_the_launcher_is_where_hydra_looks_for_it(installed: Path) -> None:
    assert [path.name for path in (installed / "hydra_plugins").rglob("*.py")] == ["__init__.py"]
    assert not (installed / "hydra_plugins/__init__.py").exists(), "a namespace that other distributions share"
    assert (installed / "hydra_plugins/mbfn_launcher/__init__.py").is_file()


def test_the_wheel_composes_from_its_own_files(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{COMPOSE}"],
        cwd=installed.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    place, _, text = done.stdout.partition("\n")
    assert place == str(installed / "mbfn/conf")
    assert text == to_yaml(compose("model=llama31_70b", "parallel=tp8pp4"))
