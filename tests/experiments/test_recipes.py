"""Every recipe: short, composed and planned as its golden file says, able to run where its title says."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import yaml

import mbfn
from mbfn.config import to_dict
from mbfn.config.groups import experiments_dir, header
from mbfn.config.run import RunConfig
from mbfn.plan.devices import DEVICES
from mbfn.plan.facts import facts
from mbfn.plan.search import fits

RECIPES = sorted(path.stem for path in experiments_dir().glob("*.yaml"))

# name: ranks of the published layout, tp, pp, cp, sequence length, global and micro-batch (Megatron Bridge, H100)
PUBLISHED = {
    "llama2_7b_pretrain": (2, 2, 1, 1, 4096, 512, 1),
    "llama32_1b_pretrain": (1, 1, 1, 1, 8192, 512, 1),
    "llama32_3b_pretrain": (1, 1, 1, 1, 8192, 512, 1),
    "llama3_8b_pretrain": (2, 1, 1, 2, 8192, 512, 1),
    "llama31_8b_pretrain": (2, 1, 1, 2, 8192, 512, 1),
    "llama3_8b_pretrain_fp8": (2, 1, 1, 2, 8192, 768, 1),
    "llama3_8b_pretrain_16k": (16, 4, 2, 2, 16384, 512, 1),
    "llama3_8b_pretrain_64k": (32, 4, 2, 4, 65536, 512, 1),
    "llama3_8b_pretrain_128k": (64, 4, 2, 8, 131072, 512, 1),
    "llama3_70b_pretrain": (32, 4, 4, 2, 8192, 512, 1),
    "llama3_70b_pretrain_16k": (32, 8, 2, 2, 16384, 512, 1),
    "llama3_70b_pretrain_64k": (256, 8, 4, 8, 65536, 512, 1),
    "llama31_70b_pretrain": (32, 4, 4, 2, 131072, 512, 1),
    "llama31_405b_pretrain": (256, 8, 8, 4, 131072, 512, 1),
    "llama3_8b_perf": (8, 1, 1, 2, 8192, 128, 1),
    "llama3_8b_perf_fp8": (8, 1, 1, 2, 8192, 128, 1),
    "llama3_70b_perf": (64, 4, 4, 2, 8192, 256, 1),
    "llama3_70b_perf_fp8": (64, 4, 8, 1, 8192, 256, 1),
    "llama31_405b_perf_fp8": (1024, 8, 8, 2, 8192, 1536, 1),
    "qwen2_0_5b_pretrain": (1, 1, 1, 1, 4096, 32, 2),
    "qwen2_1_5b_pretrain": (1, 1, 1, 1, 4096, 32, 2),
    "qwen2_7b_pretrain": (2, 2, 1, 1, 4096, 32, 2),
    "qwen2_72b_pretrain": (32, 8, 4, 1, 4096, 32, 2),
    "qwen25_0_5b_pretrain": (1, 1, 1, 1, 4096, 32, 2),
    "qwen25_1_5b_pretrain": (1, 1, 1, 1, 4096, 32, 2),
    "qwen25_7b_pretrain": (2, 2, 1, 1, 4096, 32, 2),
    "qwen25_14b_pretrain": (4, 4, 1, 1, 4096, 32, 2),
    "qwen25_32b_pretrain": (16, 8, 2, 1, 4096, 32, 2),
    "qwen25_72b_pretrain": (32, 8, 4, 1, 4096, 32, 2),
    "qwen3_0_6b_pretrain": (1, 1, 1, 1, 4096, 32, 2),
    "qwen3_1_7b_pretrain": (1, 1, 1, 1, 4096, 32, 2),
    "qwen3_4b_pretrain": (2, 2, 1, 1, 4096, 32, 2),
    "qwen3_8b_pretrain": (4, 4, 1, 1, 4096, 32, 2),
    "qwen3_8b_pretrain_dp16": (16, 1, 1, 1, 4096, 1024, 1),
    "qwen3_14b_pretrain": (8, 8, 1, 1, 4096, 32, 2),
    "qwen3_32b_pretrain": (16, 8, 2, 1, 4096, 32, 2),
}

# name: ranks, tp, pp, ep, sequence length, global batch size; micro-batches of one (Megatron Bridge, H100)
TUNED = {
    "llama32_1b_sft": (1, 1, 1, 1, 4096, 8),
    "llama32_1b_lora": (1, 1, 1, 1, 4096, 8),
    "llama31_8b_sft": (2, 2, 1, 1, 4096, 8),
    "llama31_8b_lora": (1, 1, 1, 1, 4096, 8),
    "llama31_70b_sft": (32, 8, 4, 1, 4096, 8),
    "llama31_70b_lora": (8, 8, 1, 1, 4096, 8),
    "qwen25_7b_sft": (2, 2, 1, 1, 2048, 128),
    "qwen25_7b_lora": (1, 1, 1, 1, 2048, 128),
    "qwen3_8b_sft": (4, 4, 1, 1, 2048, 32),
    "qwen3_8b_lora": (1, 1, 1, 1, 2048, 32),
    "qwen3_32b_sft": (16, 8, 2, 1, 2048, 8),
    "qwen3_32b_lora": (1, 1, 1, 1, 2048, 8),
    "qwen3_30b_a3b_sft": (8, 4, 2, 4, 2048, 32),
    "qwen3_30b_a3b_lora": (4, 4, 1, 4, 2048, 32),
    "qwen3_235b_a22b_sft": (64, 4, 16, 4, 2048, 32),
    "qwen3_235b_a22b_lora": (16, 4, 4, 4, 2048, 32),
    "gemma3_1b_sft": (1, 1, 1, 1, 4096, 32),
    "gemma3_1b_lora": (1, 1, 1, 1, 4096, 32),
    "gemma2_9b_sft": (4, 4, 1, 1, 2048, 128),
    "gemma2_9b_lora": (1, 1, 1, 1, 2048, 128),
    "gpt_oss_20b_sft": (8, 1, 1, 8, 2048, 128),
    "gpt_oss_20b_lora": (1, 1, 1, 1, 2048, 128),
    "glm45_air_lora": (8, 1, 2, 4, 2048, 128),
    "olmoe_1b_7b_sft": (8, 1, 1, 8, 4096, 128),
    "olmoe_1b_7b_lora": (1, 1, 1, 1, 4096, 128),
}


@functools.cache
def compose(name: str) -> RunConfig:
    return mbfn.compose(f"+experiment={name}")


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_values_and_what_follows_are_as_reviewed(
    name: str, golden: Callable[[str], Callable[[str], None]]
) -> None:
    run = compose(name)
    content = {"config": to_dict(run), "derived": facts(run)}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    golden(f"experiments/{name}.yaml")(text)


def test_no_golden_is_left_of_a_recipe_that_is_gone() -> None:
    from tests.conftest import GOLDENS

    assert sorted(path.stem for path in (GOLDENS / "experiments").glob("*.yaml")) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_says_what_it_is(name: str) -> None:
    lines = (experiments_dir() / f"{name}.yaml").read_text().splitlines()
    assert len(lines) < 15
    assert lines[0] == "# @package _global_"
    assert re.match(r"# [A-Z].{20,}", lines[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_and_batch_are_the_published_ones(name: str) -> None:
    ranks, tp, pp, cp, seq_length, batch, micro = PUBLISHED[name]
    run = compose(name)
    parallel, train = run.parallel, run.train
    assert (parallel.tp, parallel.pp, parallel.cp) == (tp, pp, cp)
    assert (train.seq_length, train.global_batch_size, train.micro_batch_size) == (seq_length, batch, micro)
    assert parallel.world_size % ranks == 0
    assert parallel.world_size == ranks or "replicas" in header(experiments_dir() / f"{name}.yaml")[0]


@pytest.mark.parametrize("name", TUNED)
def test_fine_tuning_has_the_published_layout_and_batch(name: str) -> None:
    run = compose(name)
    parallel, train = run.parallel, run.train
    found = parallel.world_size, parallel.tp, parallel.pp, parallel.ep, train.seq_length, train.global_batch_size
    assert found == TUNED[name]
    assert (train.micro_batch_size, parallel.cp, train.steps) == (1, 1, 1000)
    assert run.peft.kind == ("lora" if name.endswith("_lora") else "none")
    assert run.optim.lr == (1e-4 if name.endswith("_lora") else 5e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_fits_80_gb(name: str) -> None:
    assert fits(compose(name), DEVICES["h100"])
