"""`python -m mbfn.plan` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from mbfn.config.groups import conf_dir

RUN_8B = ("model=llama31_8b", "precision=bf16", "train.seq_length=8192", "train.micro_batch_size=1", "device=h200")


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mbfn.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"}, check=False)


def values(*arguments: str) -> Any:
    done = plan(*arguments, "format=json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_plan_names_memory_operations_communication_and_time() -> None:
    done = plan(*RUN_8B, "parallel=tp2", "tokens=15e12")
    assert done.returncode == 0, done.stderr
    for text in ("8,030,261,248 parameters", "activations", "51.47", "57.91", "reduce-scatter", "15,000,000,000,000"):
        assert text in done.stdout


def test_json_has_the_same_plan() -> None:
    found = values(*RUN_8B, "parallel=tp2pp2")
    assert found["fits"]
    assert [stage["layers"] for stage in found["stages"]] == [16, 16]
    assert found["facts"]["world_size"] == 4
    assert {item["group"] for item in found["traffic"]} == {"tp", "pp"}
    assert found["speed"]["step"] > 0


def test_pictures_are_drawn(tmp_path: Path) -> None:
    done = plan("model=llama_tiny", "parallel=pp2", f"out={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    for name in ("memory.png", "pipeline.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_says_why_and_what_would() -> None:
    done = plan(*RUN_8B)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: parallel: does not fit: stage 0 needs ")
    assert "optimizer 89.7" in line
    advice = line.rpartition(" with ")[2].split()
    assert plan(*RUN_8B, *advice).returncode == 0


def test_search_lists_layouts_that_plan_accepts() -> None:
    found = values(*RUN_8B, "search=true", "gpus=8", "top=3")
    assert len(found) == 3
    assert plan(*RUN_8B, *found[0]["overrides"]).returncode == 0
    shown = plan(*RUN_8B, "search=true", "gpus=8", "top=3")
    assert "parallel.dp=" in shown.stdout


def test_search_on_too_few_gpus_is_one_line() -> None:
    done = plan("model=llama31_405b", "precision=bf16", "search=true", "gpus=2")
    assert (done.returncode, done.stderr) == (
        2,
        "error: gpus: no layout of this model and batch on 2 x H100 SXM 80 GB fits; give more\n",
    )


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from mbfn.plan.__main__ import plan; from mbfn.plan import report, pictures, search; "
        "print(sorted({'torch', 'megatron', 'transformers', 'jax', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_takes_the_groups_that_training_takes() -> None:
    plan_groups, train_groups = (
        yaml.safe_load((conf_dir() / f"{name}.yaml").read_text())["defaults"][1:] for name in ("plan", "config")
    )
    assert plan_groups == train_groups
