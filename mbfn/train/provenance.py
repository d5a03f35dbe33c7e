"""What produced an output directory: the resolved config and the versions, beside the results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mbfn
from mbfn.config.run import RunConfig

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


def write_provenance(output_dir: Path, run: RunConfig, command: tuple[str, ...], facts: Mapping[str, Any]) -> None:
    """Leave `config.yaml` and `run.json` in the output directory."""
    from mbfn.config import to_yaml

    record = {
        "digest": run.digest,
        "command": list(command),
        "parameters": run.model.num_parameters,
        "world_size": run.parallel.world_size,
        **facts,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    write_text(output_dir / "config.yaml", to_yaml(run))
    write_text(output_dir / "run.json", json.dumps(record, indent=2) + "\n")


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
