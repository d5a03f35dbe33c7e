"""What only Gemma and GPT-OSS have: every feature counts, training is transformers', checkpoints go both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.compose import compose
from mbfn.config.model import ModelConfig, RopeScaling
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.convert import to_hf, to_megatron
from mbfn.convert.plans import Layout, rank_plans
from mbfn.convert.table import table_of
from mbfn.storage.jobs import checkpoint_to_hf, hf_to_checkpoint
from tests.megatron.tiny import config_of, hf_model, plain_loop, run_config, train, weights_of
from tests.ranks import run_ranks

STEPS = 20
TP2PP2 = ParallelConfig(tp=2, pp=2, sequence_parallel=True)
TP2 = ParallelConfig(tp=2, sequence_parallel=True)
TOKENS = torch.randint(0, 100, (2, 29), generator=torch.Generator().manual_seed(1))
NEUTRAL: dict[str, list[dict[str, Any]]] = {
    "gemma": [{"embedding_multiplier": 1.0}, {"activation": "swiglu"}, {"zero_centered_gamma": False}],
    "gemma2": [
        {"softmax_scale": None},
        {"attn_logit_softcapping": 0.0},
        {"final_logit_softcapping": 0.0},
        {"window_size": None, "window_layers": ()},
    ],
    "gemma3": [
        {"local_rotary_base": 500.0},
        {"rope_scaling": RopeScaling()},
        {"window_layers": (0, 1)},
        {"rotary_base": 50.0},
    ],
    "gpt_oss": [
        {"activation": "swiglu"},
        {"window_size": None, "window_layers": ()},
        {"rope_scaling": RopeScaling()},
    ],
    "rope_yarn": [
        {"rope_scaling": RopeScaling()},
        {"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)},
        {"rotary_percent": 0.5},
    ],
}


@pytest.mark.parametrize("variant", NEUTRAL)
def test_every_feature_counts(variant: str) -> None:
    hf = hf_model(variant)
    models = [config_of(hf), *(replace(config_of(hf), **neutral) for neutral in NEUTRAL[variant])]
    ((same, *others),) = run_ranks(1, _logits, models, [weights_of(hf)] * len(models))
    with torch.no_grad():
        expected = hf(TOKENS).logits
    assert (same - expected).abs().max() < 1e-5
    apart = [float((other - expected).abs().max()) for other in others]
    assert min(apart) > 1e-3, list(zip(NEUTRAL[variant], apart, strict=True))


def _logits(models: list[ModelConfig], weights: list[Mapping[str, Tensor]]) -> list[Tensor]:
    one = ParallelConfig()
    with megatron.open_world(one, device="cpu") as world:
        found = []
        for model, given in zip(models, weights, strict=True):
            own = to_megatron(given, models[0], parallel=one)
            found.append(megatron.logits(world, megatron.build_model(run_config(model, one), world, own), TOKENS))
        return found


def test_embeddings_are_scaled_in_the_models_dtype() -> None:
    hf = hf_model("gemma").bfloat16()
    ((found,),) = [run_ranks(1, _embeddings, config_of(hf), weights_of(hf))]
    expected = hf.model.embed_tokens(TOKENS)
    assert torch.equal(found.transpose(0, 1), expected)
    assert not torch.equal(torch.nn.functional.embedding(TOKENS, hf.lm_head.weight) * 48**0.5, expected)


def _embeddings(model: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor:
    with megatron.open_world(ParallelConfig(), device="cpu") as world:
        run = run_config(model, ParallelConfig(), PrecisionConfig(params="bf16"))
        (chunk,) = megatron.build_model(run, world, to_megatron(weights, model, parallel=ParallelConfig()))
        return chunk.embedding(TOKENS, torch.arange(TOKENS.size(1))).detach()


@pytest.mark.parametrize(
    ("size", "larger", "parallel"),
    [
        ("gemma2_27b", {}, ParallelConfig(tp=8, pp=2)),
        # the text model of Gemma 3 27B
        (
            "gemma3_1b",
            {"num_layers": 62, "hidden_size": 5376, "ffn_hidden_size": 21504, "num_attention_heads": 32}
            | {"num_query_groups": 16, "kv_channels": 128, "window_layers": tuple(i for i in range(62) if i % 6 != 5)},
            ParallelConfig(tp=8, pp=2, vpp=31, sequence_parallel=True),
        ),
        ("gpt_oss_120b", {}, ParallelConfig(tp=2, pp=4, ep=8, sequence_parallel=True)),
        ("gpt_oss_20b", {}, ParallelConfig(tp=2, pp=2, ep=2, etp=2, sequence_parallel=True)),
    ],
    ids=["gemma2_27b", "gemma3_27b", "gpt_oss_120b", "gpt_oss_20b"],
)
def test_every_rank_of_a_published_size(size: str, larger: dict[str, Any], parallel: ParallelConfig) -> None:
    model = replace(compose(f"model={size}").model, **larger)
    table, ranks = table_of(model, parallel), 0
    for rank, found in megatron.meta_states(model, parallel):
        planned = rank_plans(table, Layout(parallel=parallel), rank)
        assert {name: shape for name, (shape, _) in found.items()} == {n: plan.shape for n, plan in planned.items()}
        assert {dtype for _, dtype in found.values()} == {torch.bfloat16}
        ranks += 1
    assert ranks == parallel.world_size


@pytest.mark.parametrize(
    ("variant", "names"),
    [("gpt_oss", ("sinks", "gate_up_proj_bias", "down_proj_bias", "router.bias")), ("gemma3", ("norm.weight",))],
)
def test_every_weight_counts(variant: str, names: tuple[str, ...]) -> None:
    weights, model = weights_of(hf_model(variant)), config_of(hf_model(variant))
    without = [{key: 0 * w if key.endswith(name) else w for key, w in weights.items()} for name in names]
    ((expected, *others),) = run_ranks(1, _logits, [model] * (1 + len(names)), [weights, *without])
    for name, other in zip(names, others, strict=True):
        assert (other - expected).abs().max() > 1e-3, name


@pytest.mark.parametrize("variant", ["gemma2", "gpt_oss"])
def test_it_trains_as_transformers_does(variant: str) -> None:
    hf = hf_model(variant)
    run = run_config(config_of(hf), ParallelConfig())
    ((results, _),) = run_ranks(1, train, run, weights_of(hf), steps=range(STEPS))
    expected = plain_loop(hf_model(variant), steps=STEPS)
    assert max(abs(a.loss - loss) for a, (loss, _) in zip(results, expected, strict=True)) < 1e-3
    assert max(abs(a.grad_norm / norm - 1) for a, (_, norm) in zip(results, expected, strict=True)) < 1e-3
    assert results[-1].loss < results[0].loss - 0.2


@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "gpt_oss"])
def test_a_saved_run_is_a_model_that_transformers_loads(variant: str, tmp_path: Path) -> None:
    model = config_of(hf_model(variant))
    ranks = run_ranks(
        4, train, run_config(model, TP2PP2), weights_of(hf_model(variant)), steps=range(1), save_to=str(tmp_path / "it")
    )
    checkpoint_to_hf(tmp_path / "it", tmp_path / "hf", model=model)
    trained = dict(to_hf({rank: state for rank, (_, state) in enumerate(ranks)}, model, parallel=TP2PP2))
    ((expected,),) = run_ranks(1, _logits, [model], [trained])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        assert (loaded(TOKENS).logits - expected).abs().max() < 1e-5
        assert (hf_model(variant)(TOKENS).logits - expected).abs().max() > 1e-3  # a step was made


@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "gpt_oss"])
def test_a_converted_checkpoint_loads_at_another_layout(variant: str, tmp_path: Path) -> None:
    hf = hf_model(variant)
    hf.save_pretrained(tmp_path / "hf")
    hf_to_checkpoint(tmp_path / "hf", tmp_path / "megatron", ParallelConfig(tp=2))
    run = run_config(config_of(hf), TP2PP2)
    for rank, found in enumerate(run_ranks(4, _loaded, run, tmp_path / "megatron")):
        expected = to_megatron(weights_of(hf), run.model, parallel=TP2PP2, rank=rank)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def _loaded(run: RunConfig, source: Path) -> Mapping[str, Tensor]:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        chunks = megatron.build_model(run, world, None)
        megatron.load_model(source, world, chunks)
        return {name: value.detach().clone() for name, value in megatron.chunk_tensors(chunks).items()}
