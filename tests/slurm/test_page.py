"""What docs/slurm.md shows on a cluster, done on one: blocks under a `<!-- cluster -->` mark, in one directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.runner import ROOT, Block
from tests.slurm.box import Box

PAGE = ROOT / "docs/slurm.md"
MARKED = re.compile(r"<!-- (cluster|cluster: fails|file: \S+) -->\n+```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_page(box: Box, tmp_path: Path) -> None:
    found = [Block(mark=mark, language=kind, text=text) for mark, kind, text in MARKED.findall(PAGE.read_text())]
    assert len(found) >= 7
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = box.env | {"PATH": path, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    for block in found:
        if block.mark.startswith("file: "):
            target = tmp_path / block.mark.removeprefix("file: ")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
            continue
        for command in block.commands:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert (done.returncode != 0) == (block.mark == "cluster: fails"), (command, done.stdout, done.stderr)
