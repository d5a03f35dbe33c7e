"""Packing puts every sample into exactly one bin, none of them too full; rows hold their samples and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbfn.data.packing import packed
from mbfn.data.rows import Sample, rows_of_samples

LENGTHS = st.lists(st.integers(0, 24), max_size=40)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, packing=st.sampled_from(["none", "in_order", "ffd"]), multiple=st.sampled_from([1, 4]))
def test_every_sample_is_in_one_bin_that_holds_it(lengths: list[int], packing: str, multiple: int) -> None:
    bins = packed(np.asarray(lengths, dtype=np.int64), 24, packing, multiple=multiple)  # type: ignore[arg-type]
    found = [bins[number] for number in range(len(bins))]
    assert sorted(np.concatenate([*found, []]).tolist()) == list(range(len(lengths)))
    assert all(sum(-(-lengths[i] // multiple) * multiple for i in items) <= 24 for items in found)
    assert all(len(items) for items in found)
    if packing != "ffd":
        assert bins.items.tolist() == list(range(len(lengths)))


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), max_size=40))
def test_first_fit_decreasing_is_what_its_name_says(lengths: list[int]) -> None:
    """Against the loop that the vectorised one stands for."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = (box for box in bins if sum(lengths[i] for i in box) + lengths[item] <= 24)
        box = next(fitting, None)
        if box is None:
            bins.append(box := [])
        box.append(item)
    found = packed(np.asarray(lengths, dtype=np.int64), 24, "ffd")
    assert [found[number].tolist() for number in range(len(found))] == bins


def test_in_order_opens_a_bin_only_when_the_last_is_full() -> None:
    found = packed(np.asarray([10, 14, 1, 20, 5]), 24, "in_order")
    assert [found[number].tolist() for number in range(len(found))] == [[0, 1], [2, 3], [4]]


def test_a_sample_that_no_bin_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="an item of 28 is larger than a bin of 24"):
        packed(np.asarray([25]), 24, "ffd", multiple=4)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4), multiple=st.sampled_from([1, 4]))
def test_a_packed_row_is_its_samples(lengths: list[int], multiple: int) -> None:
    """The same tokens, labels, weights and positions as in a padded row each, and weight 0 elsewhere."""
    starts = np.cumsum([0, *lengths])
    samples = [
        Sample(np.arange(start + 1, start + 1 + length), np.arange(start, start + length) % 3 / 2)
        for start, length in zip(starts, lengths, strict=False)
    ]
    row = rows_of_samples([samples], 48, pack=True, multiple=multiple)
    alone = rows_of_samples([[sample] for sample in samples], 48, pack=False)
    assert row.segments is not None
    assert sum(row.segments[0]) == 48
    place = 0
    for number, (sample, taken) in enumerate(zip(samples, row.segments[0], strict=False)):
        assert taken % multiple == 0
        inside = slice(place, place + sample.positions)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert np.array_equal(getattr(row, name)[0, inside], getattr(alone, name)[number, : sample.positions])
        place += taken
    assert np.isclose(row.loss_mask.sum(), alone.loss_mask.sum())
    assert row.position_ids[0].tolist() == [i for taken in row.segments[0] for i in range(taken)]
