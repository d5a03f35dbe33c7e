"""Batches are functions of the configuration and the step, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbfn.config.run import RunConfig
from mbfn.config.train import TrainConfig
from mbfn.data import Split, open_dataset, prefetched, read_batch
from mbfn.data.batches import replica_rows
from mbfn.data.windows import cut
from tests.data.runs import make_run, mock_run

RUN = make_run(Path("unused"))


def splits(tokens: int, run: RunConfig = RUN, valid_fraction: float = 0.2) -> tuple[Split, Split | None]:
    """Tokens that count up, so that a misplaced one shows."""
    return cut(np.arange(tokens, dtype=np.uint32), run, replace(run.data, valid_fraction=valid_fraction))


def tokens_of(split: Split, run: RunConfig, number: int, dp_rank: int = 0) -> torch.Tensor:
    return torch.cat([micro["tokens"] for micro in read_batch(split, run, number, dp_rank)])


@settings(max_examples=50, deadline=None)
@given(dp=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), step=st.integers(0, 10**6))
def test_replicas_share_out_the_global_batch(dp: int, micro: int, step: int) -> None:
    run = make_run(Path("unused"), dp=dp, micro_batch_size=micro, global_batch_size=16)
    train, _ = splits(2000, run)
    shares = [tokens_of(train, run, step, rank) for rank in range(dp)]
    whole = tokens_of(train, make_run(Path("unused"), global_batch_size=16), step)
    assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())
    numbers = np.concatenate([replica_rows(run, step, rank) for rank in range(dp)])
    assert sorted(numbers.tolist()) == list(range(16 * step, 16 * (step + 1)))


def test_a_micro_batch_predicts_the_next_token() -> None:
    train, _ = splits(2000)
    for micro in read_batch(train, RUN, 0, 0):
        assert set(micro) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert {tuple(value.shape) for value in micro.values()} == {(2, 16)}
        assert {micro[name].dtype for name in ("tokens", "labels", "position_ids")} == {torch.int64}
        assert micro["loss_mask"].dtype == torch.float32
        assert torch.equal(micro["labels"], micro["tokens"] + 1)
        assert torch.equal(micro["position_ids"], torch.arange(16).expand(2, 16))
        assert micro["loss_mask"].all()


@pytest.mark.parametrize("windows", [8, 50, 61])
def test_an_epoch_reads_every_window_once(windows: int) -> None:
    train, valid = splits(windows * 16 + 1, valid_fraction=0.0)
    assert valid is None
    rows = torch.cat([tokens_of(train, RUN, step) for step in range(-(-2 * windows // 8))])
    first, second = rows[:windows, 0].tolist(), rows[windows : 2 * windows, 0].tolist()
    assert sorted(first) == sorted(second) == [16 * i for i in range(windows)]
    assert first != second


def test_held_out_text_is_never_trained_on() -> None:
    train, valid = splits(1000)
    assert valid is not None
    trained = {token for step in range(40) for token in tokens_of(train, RUN, step).ravel().tolist()}
    held_out = {token for batch in range(3) for token in tokens_of(valid, RUN, batch).ravel().tolist()}
    assert trained
    assert held_out
    assert not trained & held_out
    assert torch.equal(tokens_of(valid, RUN, 0), tokens_of(valid, RUN, 0))


def test_the_seed_changes_the_order() -> None:
    other = replace(RUN, train=replace(RUN.train, seed=TrainConfig().seed + 1))
    assert not torch.equal(tokens_of(splits(2000)[0], RUN, 0), tokens_of(splits(2000, other)[0], other, 0))


def test_random_tokens_are_those_of_their_number() -> None:
    run = mock_run()
    data = open_dataset(run)
    assert data.valid is not None
    numbers = np.asarray([5, 0, 11])
    rows = data.train.read(numbers)
    assert np.array_equal(rows.tokens[1], data.train.read(np.asarray([0])).tokens[0])
    assert np.array_equal(rows.labels[:, :-1], rows.tokens[:, 1:])
    assert not np.array_equal(rows.tokens, data.valid.read(numbers).tokens)
    assert 0 <= rows.tokens.min() <= rows.tokens.max() < run.model.vocab_size


def test_prefetching_changes_neither_items_nor_errors() -> None:
    def items(stop: int) -> Iterator[int]:
        yield from range(stop)
        raise KeyError("the last")

    made = prefetched(items(7))
    assert [next(made) for _ in range(7)] == list(range(7))
    with pytest.raises(KeyError, match="the last"):
        next(made)
    left = prefetched(iter(range(10**9)))
    assert next(left) == 0
    left.close()
