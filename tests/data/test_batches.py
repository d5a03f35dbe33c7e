"""Batches are functions of the configuration and the step, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbfn.config.train import TrainConfig
from mbfn.data import Dataset, micro_batches, train_rows, valid_rows
from mbfn.data.dataset import cut
from mbfn.data.tokenizer import TokenizerFiles
from tests.data.runs import make_run

RUN = make_run(Path("unused"))


def dataset(tokens: int, seq_length: int, valid_fraction: float = 0.2) -> Dataset:
    """Tokens that count up, so that a misplaced one shows."""
    run = make_run(Path("unused"), data={"valid_fraction": valid_fraction}, seq_length=seq_length)
    return cut(np.arange(tokens, dtype=np.uint32), run, tokenizer=TokenizerFiles(()), digest="")


@settings(max_examples=50, deadline=None)
@given(dp=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), step=st.integers(0, 10**6))
def test_replicas_share_out_the_global_batch(dp: int, micro: int, step: int) -> None:
    run = make_run(Path("unused"), dp=dp, micro_batch_size=micro, global_batch_size=16)
    data = dataset(2000, 16)
    rows = train_rows(data, run, step)
    shares = [micro_batches(rows, run, rank) for rank in range(dp)]
    seen = torch.cat([micro["tokens"] for share in shares for micro in share])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, rows[:, :-1].tolist()))
    assert np.array_equal(rows, train_rows(data, make_run(Path("unused"), global_batch_size=16), step))


def test_a_micro_batch_predicts_the_next_token() -> None:
    data = dataset(2000, 16)
    for micro in micro_batches(train_rows(data, RUN, 0), RUN, 0):
        assert set(micro) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert {(tuple(value.shape), value.dtype) for value in micro.values()} == {((2, 16), torch.int64)}
        assert torch.equal(micro["labels"], micro["tokens"] + 1)
        assert torch.equal(micro["position_ids"], torch.arange(16).expand(2, 16))
        assert micro["loss_mask"].all()


@pytest.mark.parametrize("windows", [8, 50, 61])
def test_an_epoch_reads_every_window_once(windows: int) -> None:
    data = dataset(windows * 16 + 1, 16, valid_fraction=0.0)
    assert (data.train_windows, data.valid_windows) == (windows, 0)
    rows = np.concatenate([train_rows(data, RUN, step) for step in range(-(-2 * windows // 8))])
    first, second = rows[:windows, 0], rows[windows : 2 * windows, 0]
    assert sorted(first.tolist()) == sorted(second.tolist()) == [16 * i for i in range(windows)]
    assert first.tolist() != second.tolist()


def test_held_out_text_is_never_trained_on() -> None:
    data = dataset(1000, 16)
    trained = {token for step in range(40) for token in train_rows(data, RUN, step)[:, :-1].ravel().tolist()}
    held_out = {token for batch in range(3) for token in valid_rows(data, RUN, batch)[:, :-1].ravel().tolist()}
    assert trained
    assert held_out
    assert not trained & held_out
    assert np.array_equal(valid_rows(data, RUN, 0), valid_rows(data, RUN, 0))


def test_the_seed_changes_the_order() -> None:
    data = dataset(2000, 16)
    other = replace(RUN, train=replace(RUN.train, seed=TrainConfig().seed + 1))
    assert not np.array_equal(train_rows(data, RUN, 0), train_rows(data, other, 0))
