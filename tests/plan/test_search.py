"""Search gives layouts that exist, fit, and are in order."""

from __future__ import annotations

import pytest

from mbfn.config.compose import compose
from mbfn.config.run import RunConfig
from mbfn.plan.devices import DEVICES
from mbfn.plan.memory import peak
from mbfn.plan.report import layout_overrides
from mbfn.plan.search import fits, search

H100 = DEVICES["h100"]
BATCH = ("train.seq_length=8192", "train.micro_batch_size=1", "train.global_batch_size=64", "precision=bf16")


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return compose("model=llama3_70b", *BATCH)


def test_every_layout_fits_and_runs_on_that_many_gpus(run: RunConfig) -> None:
    found = search(run, H100, 64)
    assert len(found) > 3
    assert all(fits(c.run, H100) and c.run.parallel.world_size == 64 and c.peak == peak(c.run) for c in found)
    steps = [c.speed.step for c in found]
    assert steps == sorted(steps)
    assert all(c.run.train.global_batch_size == 64 for c in found)


def test_the_overrides_make_the_layout_again(run: RunConfig) -> None:
    for candidate in search(run, H100, 32)[:4]:
        assert compose("model=llama3_70b", *BATCH, *layout_overrides(candidate.run)) == candidate.run


def test_the_fastest_is_no_slower_than_a_published_layout(run: RunConfig) -> None:
    from mbfn.plan.speed import estimate

    published = compose("model=llama3_70b", *BATCH, "parallel=tp4pp4vpp5cp2", "parallel.dp=2")
    assert fits(published, H100)
    assert search(run, H100, 64)[0].speed.step <= estimate(published, H100).step


def test_nothing_fits_on_too_few(run: RunConfig) -> None:
    assert search(run, H100, 8) == []
    assert search(run, DEVICES["b200"], 8) != []
