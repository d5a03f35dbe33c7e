"""Activations made again in the backward pass change memory, not training; a deterministic run repeats bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.errors import LaunchError
from mbfn.megatron.settings import core_config
from mbfn.megatron.techniques import check_techniques
from tests.megatron import mixtures
from tests.megatron.tiny import config_of, hf_model, run_config, train, weights_of
from tests.ranks import run_ranks

FULL = (
    {"recompute": "full"},
    {"recompute": "full", "recompute_num_layers": 2},
    {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
)
PARTS = (("core_attn", "layernorm"), ("mla_up_proj", "mlp", "shared_experts"), ("moe",))
SELECTIVE = tuple({"recompute": "selective", "recompute_modules": parts} for parts in PARTS)


def _each(runs: list[RunConfig], weights: Mapping[str, Tensor]) -> list[tuple]:
    return [train(run, weights, steps=range(2)) for run in runs]


@pytest.mark.parametrize(
    ("parallel", "ways"),
    [
        (ParallelConfig(), ({}, *FULL[1:], *SELECTIVE)),
        (ParallelConfig(tp=2, sequence_parallel=True), ({}, FULL[0], *SELECTIVE[:2])),
    ],
    ids=["1", "tp2"],
)
def test_recompute_trains_the_same(parallel: ParallelConfig, ways: tuple[dict[str, Any], ...]) -> None:
    torch.manual_seed(0)
    model = mixtures.MIXTURES["deepseek_v3"]().float()
    plain = run_config(config_of(model), parallel)
    runs = [replace(plain, train=replace(plain.train, **way)) for way in ways]
    (kept, weights), *others = run_ranks(parallel.world_size, _each, runs, weights_of(model))[0]
    for way, (found, after) in zip(ways[1:], others, strict=True):
        assert [step.loss for step in found] == pytest.approx([step.loss for step in kept], abs=1e-6), way
        assert all(torch.allclose(after[name], weights[name], atol=1e-5) for name in weights), way


def test_every_way_reaches_megatron() -> None:
    run = run_config(config_of(hf_model("llama")), ParallelConfig())

    def settings(**fields: Any) -> tuple:
        config = core_config(
            run.model, run.parallel, run.precision, impl="local", cpu=True, train=replace(run.train, **fields)
        )
        return config.recompute_granularity, config.recompute_method, config.recompute_num_layers

    assert settings() == (None, None, None)
    assert [settings(**way) for way in FULL] == [
        ("full", "uniform", 1),
        ("full", "uniform", 2),
        ("full", "block", 2),
    ]
    assert settings(**SELECTIVE[0]) == ("selective", None, None)
    graphs = replace(run, train=replace(run.train, cuda_graph_impl="local", cuda_graph_modules=("attn",)))
    with pytest.raises(LaunchError, match=r"train.cuda_graph_impl: needs Transformer Engine"):
        check_techniques(graphs, "local")


def _switches(run: RunConfig, weights: Mapping[str, Tensor]) -> tuple:
    found = train(run, weights, steps=range(3))
    return found, torch.are_deterministic_algorithms_enabled(), "NVTE_ALLOW_NONDETERMINISTIC_ALGO" in os.environ


def test_a_deterministic_run_is_the_same_twice_and_leaves_no_trace() -> None:
    model = hf_model("llama")
    run = run_config(config_of(model), ParallelConfig(tp=2))
    run = replace(run, train=replace(run.train, deterministic=True))
    first, second = (run_ranks(2, _switches, run, weights_of(model))[0] for _ in range(2))
    assert first[0][0] == second[0][0]
    assert all(torch.equal(first[0][1][name], second[0][1][name]) for name in first[0][1])
    assert first[1:] == (False, False)
