"""Megatron's logits are transformers', for every variant of every family, at every cut."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert import to_megatron
from tests.megatron.tiny import VARIANTS, all_logits, config_of, hf_model, run_config, weights_of
from tests.ranks import run_ranks

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp4": ParallelConfig(tp=4),  # more ranks than key/value heads
    "pp2": ParallelConfig(pp=2),
    "tp2pp2": ParallelConfig(tp=2, pp=2),
    "tp2sp": ParallelConfig(tp=2, sequence_parallel=True),
    "tp2pp2sp": ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
    "cp2": ParallelConfig(cp=2),
}
TOKENS = torch.randint(0, 100, (2, 29), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[ModelConfig, dict[str, Tensor], Tensor]]:
    made = {}
    for variant in VARIANTS:
        model = hf_model(variant)
        with torch.no_grad():
            made[variant] = (config_of(model), weights_of(model), model(TOKENS).logits)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_transformers(cases: Mapping, layout: str) -> None:
    parallel = LAYOUTS[layout]
    whole = parallel.tp > 1 and not parallel.sequence_parallel  # experts run at tp only where the sequence is cut too
    given = {variant: case[:2] for variant, case in cases.items() if not (whole and case[0].moe)}
    assert given.keys() >= cases.keys() - {"gpt_oss"}
    for rank, found in enumerate(run_ranks(parallel.world_size, all_logits, parallel, given, TOKENS)):
        apart = {variant: float((found[variant] - cases[variant][2]).abs().max()) for variant in given}
        assert max(apart.values()) < 1e-4, f"rank {rank}: {apart}"


def test_generation_is_the_same_at_every_cut(cases: Mapping) -> None:
    model, weights, _ = cases["qwen3"]
    texts = [
        text
        for parallel in (LAYOUTS["tp1"], LAYOUTS["tp2sp"], LAYOUTS["pp2vpp2"])
        for text in run_ranks(parallel.world_size, _generate, parallel, model, weights)
    ]
    greedy, sampled = texts[0]
    assert greedy[:3] == [5, 6, 7]
    assert len(greedy) == 9
    assert sampled != greedy
    assert texts == [texts[0]] * len(texts)


def _generate(parallel: ParallelConfig, model: ModelConfig, weights: Mapping[str, Tensor]) -> tuple:
    with megatron.open_world(parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, model, parallel=parallel, rank=world.rank)
        chunks = megatron.build_model(run_config(model, parallel), world, own)
        greedy = megatron.generate(world, chunks, [5, 6, 7], new_tokens=6)
        drawn = megatron.Sampling(temperature=3.0)
        return greedy, megatron.generate(world, chunks, [5, 6, 7], new_tokens=6, sampling=drawn)
