"""chex assertions for debug runs (`log.debug_checks=true`). Imported by those alone: chex brings jax."""

from __future__ import annotations

from collections.abc import Mapping

import chex
from torch import Tensor

from mbfn.config.run import RunConfig
from mbfn.train.state import Metrics

_FIELDS = {"tokens", "labels", "loss_mask", "position_ids"}


def check_batch(batch: tuple[Mapping[str, Tensor], ...], run: RunConfig) -> None:
    """Assert number, names, shapes, dtypes and token range of a rank's micro-batches."""
    assert len(batch) == run.num_microbatches, (len(batch), run.num_microbatches)
    shape = (run.train.micro_batch_size, run.train.seq_length)
    for micro in batch:
        assert set(micro) - {"cu_seqlens"} == _FIELDS, sorted(micro)
        chex.assert_shape([micro[name] for name in sorted(_FIELDS)], shape)
        chex.assert_trees_all_equal_dtypes(*(micro[name] for name in sorted(_FIELDS - {"loss_mask"})))
        assert micro["loss_mask"].is_floating_point(), micro["loss_mask"].dtype
        for name in ("tokens", "labels"):
            low, high = int(micro[name].min()), int(micro[name].max())
            assert 0 <= low <= high < run.model.vocab_size, (name, low, high, run.model.vocab_size)


def check_metrics(metrics: Metrics) -> None:
    """Assert that the loss is a finite number and the counters are positive."""
    chex.assert_tree_all_finite({"loss": metrics.loss, "lr": metrics.lr})
    chex.assert_scalar_positive(metrics.tokens)
    chex.assert_scalar_non_negative(metrics.lr)
