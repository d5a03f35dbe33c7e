"""One Slurm for all tests of this directory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.box import PACKAGES, Box, missing, slurm_box


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Four nodes of four CPUs, and of four fake GPUs where this process may make devices."""
    if absent := missing():
        pytest.skip(f"no Slurm on this machine ({', '.join(absent)}); apt-get install {PACKAGES}")
    with slurm_box(tmp_path_factory.mktemp("slurm"), gpus=4 if os.getuid() == 0 else 0) as started:
        yield started
