"""The schedule's laws: complete, ordered, never deadlocked; what is held at once; the bubble."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbfn.config.parallel import ParallelConfig
from mbfn.plan.schedule import Slot, bubble, in_flight, tasks, timeline


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[ParallelConfig, int]:
    pp = draw(st.integers(1, 5))
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    microbatches = draw(st.integers(1, 4)) * (pp if vpp > 1 else 1)
    return ParallelConfig(pp=pp, vpp=vpp), microbatches


@given(pipelines())
def test_every_micro_batch_goes_once_through_every_chunk_and_back(case: tuple[ParallelConfig, int]) -> None:
    parallel, microbatches = case
    expected = {
        (kind, c, m) for kind in ("forward", "backward") for c in range(parallel.vpp) for m in range(microbatches)
    }
    for stage in range(parallel.pp):
        done = [(task.kind, task.chunk, task.microbatch) for task in tasks(parallel, stage, microbatches)]
        assert set(done) == expected
        assert len(done) == len(expected)
        assert all(done.index(("forward", c, m)) < done.index(("backward", c, m)) for _, c, m in expected)


@given(pipelines())
def test_no_stage_waits_for_ever_or_does_two_things_at_once(case: tuple[ParallelConfig, int]) -> None:
    parallel, microbatches = case
    slots = timeline(parallel, microbatches, [[(1.0, 2.0)] * parallel.vpp] * parallel.pp)
    assert len(slots) == 2 * parallel.pp * parallel.vpp * microbatches
    for stage in range(parallel.pp):
        own = sorted((slot for slot in slots if slot.stage == stage), key=lambda slot: slot.start)
        assert all(before.stop <= after.start for before, after in itertools.pairwise(own))


@given(pipelines())
def test_in_flight_is_the_most_that_the_schedule_holds(case: tuple[ParallelConfig, int]) -> None:
    parallel, microbatches = case
    for stage in range(parallel.pp):
        held, most = Counter[int](), 0
        for task in tasks(parallel, stage, microbatches):
            held[task.chunk] += 1 if task.kind == "forward" else -1
            most = max(most, held.total())
        assert sum(in_flight(parallel, stage, microbatches)) == most


@pytest.mark.parametrize(
    ("parallel", "microbatches"),
    [
        (ParallelConfig(pp=4), 8),
        (ParallelConfig(pp=4, vpp=2), 8),
        (ParallelConfig(pp=2, vpp=3), 4),
        (ParallelConfig(), 3),
    ],
    ids=["pp4", "pp4vpp2", "pp2vpp3", "one"],
)
def test_the_bubble_is_what_the_busiest_stage_idles(parallel: ParallelConfig, microbatches: int) -> None:
    slots = timeline(parallel, microbatches, [[(1.0, 2.0)] * parallel.vpp] * parallel.pp)
    end = max(slot.stop for slot in slots)
    busy = sum(slot.stop - slot.start for slot in _of(slots, 0))
    assert 1 - busy / end == pytest.approx(bubble(parallel, microbatches), abs=0.02)


def test_the_first_stage_of_1f1b_holds_one_micro_batch_a_stage() -> None:
    assert [in_flight(ParallelConfig(pp=4), stage, 16) for stage in range(4)] == [(4,), (3,), (2,), (1,)]


def test_interleaving_holds_more_of_the_first_chunk() -> None:
    assert in_flight(ParallelConfig(pp=2, vpp=2), 0, 8) == (3, 2)


def _of(slots: tuple[Slot, ...], stage: int) -> list[Slot]:
    return [slot for slot in slots if slot.stage == stage]
