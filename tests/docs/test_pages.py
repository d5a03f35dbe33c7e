"""Every command and program that the README and docs/ mark as run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.runner import blocks, pages, run_page

CASES = [
    pytest.param(page, marks=pytest.mark.slow if any("slow" in b.mark for b in blocks(page)) else (), id=page.name)
    for page in pages()
    if blocks(page)
]


@pytest.mark.parametrize("page", CASES)
def test_page(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)
