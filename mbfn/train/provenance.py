"""What produced an output directory: the resolved config and the versions, beside the results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mbfn
from mbfn.config.run import RunConfig

_LONGEST_DIFF = 1 << 20
_PACKAGES = (
    "mbfn",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)


_VARIABLES = ("MBFN_", "NCCL_", "CUDA_", "TORCH", "NVTE_", "PYTORCH_", "OMP_", "GLOO_", "HF_", "SLURM_JOB_ID")
CONFIG, RECORD, STARTS, DIFF = "config.yaml", "run.json", "starts.jsonl", "code.diff"


def write_provenance(output_dir: Path, run: RunConfig, command: tuple[str, ...], facts: Mapping[str, Any]) -> None:
    """Leave in the output directory what produces it: `config.yaml`, `run.json`, `code.diff`, `starts.jsonl`."""
    from mbfn.config import to_yaml

    code = code_state()
    record = {
        "digest": run.digest,
        "command": list(command),
        "parameters": run.model.num_parameters,
        "world_size": run.parallel.world_size,
        **facts,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": versions(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "packages": packages(),
    }
    write_text(output_dir / CONFIG, to_yaml(run))
    write_text(output_dir / RECORD, json.dumps(record, indent=2) + "\n")
    write_text(output_dir / DIFF, code["diff"])
    start: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "host": platform.node()}
    start |= {name: record.get(name) for name in ("digest", "command", "from", "git", "versions")}
    with (output_dir / STARTS).open("a") as file:
        file.write(json.dumps(start) + "\n")


def checkpoint_facts(run: RunConfig, data_digest: str, command: tuple[str, ...]) -> dict[str, Any]:
    """What every checkpoint of a run says of its origin."""
    from mbfn.config.schema import to_dict

    return {
        "data": data_digest,
        "digest": run.digest,
        "config": to_dict(run),
        "command": list(command),
        "versions": versions(),
        "code": code_state(),
    }


def packages() -> dict[str, str]:
    """Every installed package."""
    found = {part.metadata["Name"]: part.version for part in metadata.distributions()}
    return {name: found[name] for name in sorted(found, key=str) if name}


def code_state() -> dict[str, str]:
    """The revision of the checkout that mbfn is imported from, and how its files differ; empty when installed."""
    root = Path(mbfn.__file__).parents[1]
    if not (root / ".git").exists():
        return {"commit": "", "diff": ""}
    try:
        return {"commit": _git(root, "rev-parse", "HEAD"), "diff": _git(root, "diff", "HEAD")[:_LONGEST_DIFF]}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "", "diff": ""}


def versions() -> dict[str, str]:
    """The installed packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit of the checkout that mbfn is imported from, `+` behind it where files differ; none when installed."""
    root = Path(mbfn.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
