"""Activations made again in the backward pass change memory, not training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mbfn.config.parallel import ParallelConfig
from mbfn.megatron.settings import core_config
from tests.megatron.tiny import config_of, hf_model, run_config, train, weights_of
from tests.ranks import run_ranks


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tp=2, sequence_parallel=True)], ids=["1", "tp2"])
def test_full_recompute_trains_the_same(parallel: ParallelConfig) -> None:
    model = hf_model("llama")
    kept = run_config(config_of(model), parallel)
    again = replace(kept, train=replace(kept.train, recompute="full"))
    assert core_config(kept.model, parallel, kept.precision, impl="local", cpu=True).recompute_granularity is None
    both = [run_ranks(parallel.world_size, train, run, weights_of(model), steps=range(3))[0] for run in (kept, again)]
    assert both[0][0] == both[1][0]
    assert all(torch.equal(both[0][1][name], both[1][1][name]) for name in both[0][1])


def test_full_recompute_reaches_megatron() -> None:
    run = run_config(config_of(hf_model("llama")), ParallelConfig())
    config = core_config(run.model, run.parallel, run.precision, impl="local", cpu=True, recompute="full")
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == (
        "full",
        "uniform",
        1,
    )
