"""The computed order is a permutation, and each epoch and seed has its own."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mbfn.data.order import permuted

seeds = st.integers(0, 2**32)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=seeds, epoch=st.integers(0, 50))
def test_every_index_appears_once(size: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 10**12), seed=seeds, data=st.data())
def test_a_position_does_not_depend_on_those_asked_with_it(size: int, seed: int, data: st.DataObject) -> None:
    positions = np.asarray(data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=6)))
    together = permuted(positions, size, seed, 3)
    alone = [int(permuted(positions[[i]], size, seed, 3)[0]) for i in range(len(positions))]
    assert together.tolist() == alone
    assert all(0 <= index < size for index in alone)


def test_epochs_and_seeds_differ_and_the_order_is_fixed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return permuted(np.arange(1000), 1000, seed, epoch).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    neighbours = np.abs(np.diff(order(1, 0)))
    assert 250 < neighbours.mean() < 420  # a third of the size for a random order


def test_the_order_of_a_published_seed_stays_what_it_was() -> None:
    """A change here would give resumed runs other data than before."""
    assert permuted(np.arange(8), 100, 1234, 0).tolist() == [41, 10, 5, 0, 95, 57, 79, 94]
