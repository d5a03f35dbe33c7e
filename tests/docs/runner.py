"""Runs what the pages show: every block under a `<!-- run -->` mark, in order, in one directory a page.

A mark stands on the line before a fenced block. In a `console` block the lines that begin with `$ ` are run by bash, in
a `python` block the whole is one program. `<!-- run: slow -->` leaves the page's test to the slow ones.
`<!-- run: fails -->` shows a command that ends with an error line. `<!-- file: NAME -->` writes the block to that
file instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- (run|run: slow|run: fails|file: \S+) -->\n+```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A marked block of a page."""

    mark: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """What a shell gets: each `$ ` line with the lines it continues on."""
        joined = self.text.replace("\\\n", " ")
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def pages() -> list[Path]:
    """The README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The marked blocks of a page, in order."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(mark=mark, language=language, text=text) for mark, language, text in found]


def run_page(page: Path, directory: Path) -> None:
    """Carry out the page in `directory`; an unexpected exit code is an AssertionError that shows what was printed."""
    for block in blocks(page):
        if block.mark.startswith("file: "):
            target = directory / block.mark.removeprefix("file: ")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            _run([sys.executable, "-c", block.text], directory)
        else:
            for command in block.commands:
                _run(["bash", "-c", command], directory, fails=block.mark == "run: fails")


def _run(command: list[str], directory: Path, *, fails: bool = False) -> None:
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **paths, "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    shown = f"{command[-1]}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (done.returncode != 0) == fails, shown
    assert not fails or done.stderr.startswith("error: "), shown
