"""`python -m mbfn.train launch=slurm` as a user of the cluster of the tests runs it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.box import Box
from tests.train.command import SHORT, SMALL

ON_CPU = ("launch.device=cpu", "site.cpu_ranks_per_node=2", "launch.poll_s=0.3")


def start(box: Box, output: Path, *overrides: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    """Start the client of one run of `output`."""
    fixed = (f"hydra.run.dir={output}", f"data.cache={output.parent / 'cache'}", "launch=slurm")
    short = [text for text in SHORT if not text.startswith("optim.lr=")]
    return command(box, "mbfn.train", *short, *SMALL, *ON_CPU, *fixed, *overrides, cwd=cwd, **env)


def command(box: Box, module: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    """Start any command where Slurm's commands speak to the box."""
    settings = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd or box.root,
        env=box.env | settings | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def submitted(box: Box, output: Path, *overrides: str, **env: str) -> str:
    """Submit a run and come back: the id of its job."""
    code, out, err = finish(start(box, output, *overrides, "launch.detach=true", **env))
    assert code == 0, (out, err)
    match = re.match(r"job (\d+) submitted", out)
    assert match, out
    return match[1]


def wait_until(true: Callable[[], object], what: str, timeout: float = 180) -> None:
    """Return when `true()` is."""
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.1)
