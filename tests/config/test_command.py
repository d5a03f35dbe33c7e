"""hydra_main as users meet it: real processes of a small command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mbfn.config import RunConfig, to_dict
from mbfn.config.build import build
from mbfn.config.compose import compose
from mbfn.config.groups import catalog
from mbfn.config.help import help_text

ROOT = Path(__file__).parents[2]

TRAIN = """\
import sys
from pathlib import Path
from mbfn.config import ModelConfig, RunConfig
from mbfn.config.build import build
from mbfn.config.compose import RunContext, hydra_main
from mbfn.errors import DataError

def read_model(directory: str) -> ModelConfig:
    import yaml
    return build(ModelConfig, yaml.safe_load((Path(directory) / "model.yaml").read_text()))

def task(config: RunConfig, context: RunContext) -> None:
    if config.train.seed == 13:
        raise DataError("texts/: no text; give data.path=FILE")
    if config.train.seed == 14:
        raise KeyboardInterrupt
    print(config.train.steps, config.model.num_layers, context.output_dir, context.job_num, *context.overrides)
    heavy = sorted({"torch", "jax", "transformers", "megatron", "numpy"} & sys.modules.keys())
    print("heavy", *heavy)

if __name__ == "__main__":
    hydra_main(task, root=RunConfig, config_name="config", model_from_hf=read_model)
"""

CONVERT = """\
from dataclasses import dataclass
from mbfn.config import ParallelConfig
from mbfn.config.compose import RunContext, hydra_main

@dataclass(frozen=True, slots=True, kw_only=True)
class CopyConfig:
    out: str
    hf: str | None = None
    parallel: ParallelConfig = ParallelConfig()

def task(config: CopyConfig, context: RunContext) -> None:
    print(config.out, config.hf, config.parallel.tp)

if __name__ == "__main__":
    hydra_main(task, root=CopyConfig, config_name="copy", outputs=False)
"""

COPY_YAML = "# Copy a checkpoint.\ndefaults:\n  - copy_schema\n  - parallel: single\n  - _self_\n"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    for name, text in (("trial/__main__.py", TRAIN), ("copying/__main__.py", CONVERT), ("conf/copy.yaml", COPY_YAML)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(
    app: Path, *arguments: str, module: str = "trial", flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(app)]), "MBFN_CONF": str(app / "conf")}
    return subprocess.run(
        [sys.executable, *flags, "-m", module, *arguments],
        cwd=app,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_run_leaves_its_config_and_imports_nothing_heavy(app: Path) -> None:
    done = run(app, "train.steps=7", "parallel=tp2")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    steps, layers, output, number, *overrides = first.split()
    assert (steps, layers, number, overrides) == ("7", "4", "0", ["train.steps=7", "parallel=tp2"])
    assert second == "heavy"
    resolved = yaml.safe_load((Path(output) / ".hydra/config.yaml").read_text())
    assert build(RunConfig, resolved) == compose("train.steps=7", "parallel=tp2")
    assert (Path(output) / "trial.log").exists()


def test_cfg_prints_what_would_run(app: Path) -> None:
    done = run(app, "--cfg", "job", "model=llama31_70b", "parallel=tp8pp4", "precision=fp8", flags=("-X", "importtime"))
    assert done.returncode == 0
    config = build(RunConfig, yaml.safe_load(done.stdout))
    assert config == compose("model=llama31_70b", "parallel=tp8pp4", "precision=fp8")
    assert config.parallel.world_size == 32
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "jax", "transformers", "megatron", "numpy"}
    assert not (app / "outputs").exists()


def test_help_needs_nothing_heavy(app: Path, golden: Callable[[str], Callable[[str], None]]) -> None:
    done = run(app, "--help", flags=("-X", "importtime"))
    assert done.returncode == 0
    assert "torch" not in done.stderr
    golden("config/help.txt")(help_text(catalog(RunConfig, "config")))
    assert done.stdout == help_text(catalog(RunConfig, "config"))


ERRORS: list[tuple[str, int, str]] = [
    (
        "modle=tiny train.stesp=1",
        2,
        "modle: no such field; did you mean 'model'?\ntrain.stesp: no such field; did you mean 'train.steps'?",
    ),
    ("parallel=tp22", 2, "parallel: no option 'tp22'; did you mean 'tp2'?"),
    ("train.steps=abc --cfg job", 2, "train.steps: expected an integer, got 'abc'"),
    (
        "data.path=/a/step=3",
        2,
        "data.path: cannot read the value '/a/step=3'; quote = , : and spaces twice: 'data.path=\"/a/step=3\"'",
    ),
    ("train.seed=13", 1, "texts/: no text; give data.path=FILE"),
    ("--cfgs", 2, "unrecognized arguments: --cfgs (--help lists what this command takes)"),
    ("--config-path x", 2, "--config-path: our groups cannot be left out; add yours with --config-dir"),
    ("--config-name confg", 2, f"--config-name: no confg.yaml in {ROOT / 'conf'}; did you mean 'config'?"),
    (
        "hydra.jb.name=x",
        2,
        "hydra.jb: Could not override 'hydra.jb.name'. To append to your config use +hydra.jb.name=x "
        "Key 'jb' not in 'HydraConf'",
    ),
    ("-m train.steps=1,x", 2, "train.steps: expected an integer, got 'x'"),
    (
        "-m model.num_query_groups=4,8 parallel.tp=8,16",
        2,
        "parallel.tp: num_attention_heads=8 does not divide by tp=16: choose among [1, 2, 4, 8]",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "text"), ERRORS)
def test_errors_are_one_line_each(app: Path, arguments: str, code: int, text: str) -> None:
    done = run(app, *arguments.split())
    assert done.stderr.splitlines() == [f"error: {line}" for line in text.splitlines()]
    assert (done.returncode, done.stdout) == (code, "")


def test_interrupt_is_quiet(app: Path) -> None:
    done = run(app, "train.seed=14")
    assert (done.returncode, done.stderr) == (130, "")


def test_multirun(app: Path) -> None:
    done = run(app, "train.steps=3", "-m", "model=qwen2_tiny,qwen3_tiny", "train.seed=1,2")
    assert (done.returncode, done.stderr) == (0, "")
    jobs = [line.split() for line in done.stdout.splitlines() if line.startswith("3 2 ")]
    assert [(job[3], job[5:]) for job in jobs] == [
        ("0", ["model=qwen2_tiny", "train.seed=1"]),
        ("1", ["model=qwen2_tiny", "train.seed=2"]),
        ("2", ["model=qwen3_tiny", "train.seed=1"]),
        ("3", ["model=qwen3_tiny", "train.seed=2"]),
    ]


def test_init_hf_shows_in_what_hydra_composes(app: Path) -> None:
    model = to_dict(compose("model=qwen2_tiny", "model.num_layers=5").model)
    (app / "hf").mkdir()
    (app / "hf/model.yaml").write_text(yaml.safe_dump(model))
    done = run(app, "init.hf=hf", "--cfg", "job")
    assert yaml.safe_load(done.stdout)["model"] == model
    several = run(app, "init.hf=hf", "-m", "train.seed=1,2")
    assert [line.split()[1] for line in several.stdout.splitlines() if line.startswith("400 ")] == ["5", "5"]


def test_a_command_with_a_config_of_its_own(app: Path) -> None:
    done = run(app, "out=there", "parallel=tp2pp2", module="copying")
    assert (done.returncode, done.stdout, done.stderr) == (0, "there None 2\n", "")
    assert not (app / "outputs").exists()
    lacking = run(app, "oot=x", module="copying")
    assert lacking.stderr == "error: oot: no such field; did you mean 'out'?\n"
    assert run(app, module="copying").stderr == "error: out: is required and has no value; give out=...\n"
    other = run(app, "out=x", "model=llama_tiny", module="copying")
    assert other.stderr == "error: model: this command takes no model; its groups are parallel\n"
    shown = run(app, "--help", module="copying").stdout
    assert shown.startswith("Copy a checkpoint.\n")
    assert "  out  required\n  hf   default null\n" in shown
