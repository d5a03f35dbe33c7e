"""Models with experts and latent attention: parameters as conversion places them, operations of the chosen experts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from transformers import DeepseekV3Config, Qwen3MoeConfig

from mbfn.config.compose import compose
from mbfn.config.model import ModelConfig
from mbfn.config.optim import OptimConfig
from mbfn.config.parallel import ParallelConfig, coordinates
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import TrainConfig
from mbfn.convert.placement import rank_tensors
from mbfn.convert.table import table_of
from mbfn.families import model_from_hf
from mbfn.megatron import meta_states
from mbfn.plan.comm import bandwidth, traffic
from mbfn.plan.devices import DEVICES
from mbfn.plan.flops import token_flops
from mbfn.plan.memory import GIB, stage_memory
from mbfn.plan.search import search
from mbfn.plan.speed import estimate
from mbfn.plan.weights import stage_weights

UNEVEN = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2}  # 61 layers on 16 stages

EIGHT = {"num_layers_in_first_pipeline_stage": 7, "num_layers_in_last_pipeline_stage": 6}


@pytest.fixture(scope="module")
def deepseek() -> ModelConfig:
    """DeepSeek-V3, whose published sizes are the defaults of transformers' class."""
    return model_from_hf({**DeepseekV3Config().to_dict(), "architectures": ["DeepseekV3ForCausalLM"]})


@pytest.fixture(scope="module")
def qwen() -> ModelConfig:
    """Qwen3-30B-A3B."""
    hf = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    return model_from_hf({**hf.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]})


LAYOUTS = (ParallelConfig(), ParallelConfig(tp=2, pp=3, ep=4), ParallelConfig(tp=2, ep=2, etp=2, dp=2))


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["one", "tp2pp3ep4", "ep2etp2"])
def test_stages_hold_what_the_conversion_places(qwen: ModelConfig, parallel: ParallelConfig) -> None:
    table = table_of(qwen, parallel)
    for rank in range(0, parallel.world_size, max(parallel.world_size // 4, 1)):
        placed = sum(math.prod(tensor.shape) for tensor in rank_tensors(table, parallel, rank, "local"))
        stage = stage_weights(qwen, parallel)[coordinates(parallel, rank).pp]
        assert stage.held.parameters == placed


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("qwen", ParallelConfig(tp=2, pp=4, ep=8, sequence_parallel=True)),
        ("deepseek", ParallelConfig(tp=2, pp=16, ep=64, dp=32, sequence_parallel=True, **UNEVEN)),
    ],
    ids=["qwen", "deepseek"],
)
def test_stages_hold_what_megatron_builds(name: str, parallel: ParallelConfig, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    stages = stage_weights(model, parallel)
    firsts = [place * parallel.world_size // parallel.pp for place in (0, 1, parallel.pp - 1)]
    for rank, state in meta_states(model, parallel, firsts):
        held = sum(math.prod(shape) for shape, _ in state.values())
        assert held == stages[coordinates(parallel, rank).pp].held.parameters


def test_deepseek_has_the_published_parameters(deepseek: ModelConfig) -> None:
    (stage,) = stage_weights(deepseek, ParallelConfig())
    main = stage.held.parameters - _mtp(deepseek)
    biases = 58 * 256  # the router's correction, a buffer
    assert main - biases == 671_026_404_352


def test_a_token_meets_its_experts_alone(deepseek: ModelConfig, qwen: ModelConfig) -> None:
    for model, active in ((deepseek, 37e9), (qwen, 3.3e9)):
        flops = token_flops(model, 4096)
        matrices = (flops.layers + flops.experts) / 6
        assert matrices + model.vocab_size * model.hidden_size * 2 == pytest.approx(active, rel=0.06)


def test_latent_attention_counts_query_and_value_dims(deepseek: ModelConfig) -> None:
    layers = 61 + deepseek.mtp_num_layers
    assert token_flops(deepseek, 4096).attention == 6 * layers * 128 * (192 + 128) * 2048


def test_experts_are_cut_over_their_own_ranks(deepseek: ModelConfig) -> None:
    run = _run(deepseek, ParallelConfig(pp=16, ep=64, dp=64, **UNEVEN))
    held = stage_memory(run)[7].parameters
    more = stage_memory(_run(deepseek, ParallelConfig(pp=16, ep=32, dp=64, **UNEVEN)))[7].parameters
    expert = 3 * 7168 * 2048
    assert more - held == 4 * 4 * expert  # four layers a stage, four experts more
    groups = {item.group: item for item in traffic(run)}
    assert groups["ep"].size == 64
    assert "edp" not in groups  # each expert once
    assert estimate(run, DEVICES["h100"]).stages[7].expert_parallel > 0


def test_a_plan_of_one_dense_model_grows_with_what_its_layers_keep() -> None:
    gemma = compose("model=gemma2_2b").model
    plain = replace(gemma, norm_placement="pre", attn_logit_softcapping=0.0)
    held = [stage_memory(_run(model, ParallelConfig()))[0].activations for model in (gemma, plain)]
    norms = 2 * 4096 * gemma.hidden_size * 2
    assert held[0] - held[1] == gemma.num_layers * norms
    peaks = [stage_memory(_run(model, ParallelConfig()))[0].temporary for model in (gemma, plain)]
    assert peaks[0] >= peaks[1]  # a block of soft-capped scores


def test_a_cut_mixture_is_planned_as_it_was_measured(qwen: ModelConfig) -> None:
    """The row moe_bf16 of docs/performance.md: peak memory, and the milliseconds of its kernels on one H200."""
    run = RunConfig(
        model=replace(qwen, num_layers=8),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(params="bf16", grads="bf16", exp_avg="bf16", exp_avg_sq="bf16"),
        train=TrainConfig(seq_length=4096, micro_batch_size=2, global_batch_size=8),
    )
    assert stage_memory(run)[0].peak / GIB == pytest.approx(64.8, rel=0.02)
    assert 1e3 * estimate(run, DEVICES["h200"]).step == pytest.approx(
        486.9 - 84.2, rel=0.1
    )  # its profile, less the gaps


@pytest.mark.parametrize(
    ("name", "parallel", "batch", "published"),
    [
        ("qwen", ParallelConfig(ep=16, dp=16), 1024, 8826),
        ("deepseek", ParallelConfig(tp=2, pp=8, ep=64, dp=64, sequence_parallel=True, **EIGHT), 8192, 1297),
    ],
    ids=["qwen", "deepseek"],
)
def test_throughput_is_of_the_published_order(
    name: str, parallel: ParallelConfig, batch: int, published: float, request: pytest.FixtureRequest
) -> None:
    run = RunConfig(
        model=request.getfixturevalue(name),
        parallel=parallel,
        precision=PrecisionConfig(params="bf16", grads="bf16", fp8="tensorwise"),
        optim=OptimConfig(overlap_grad_reduce=True, overlap_param_gather=True),
        train=TrainConfig(seq_length=4096, micro_batch_size=1, global_batch_size=batch),
    )
    planned = estimate(run, DEVICES["h100"]).tokens_per_second / parallel.world_size
    assert planned == pytest.approx(published, rel=0.45)  # docs/plan.md says why it is no closer


def test_tokens_for_the_own_node_do_not_cross_the_network(qwen: ModelConfig) -> None:
    rates = []
    for ep in (8, 16, 32):
        (item,) = (t for t in traffic(_run(qwen, ParallelConfig(ep=ep, dp=ep))) if t.group == "ep")
        rates.append(bandwidth(item, DEVICES["h100"]))
    link, network = 450e9 * 0.59, 50e9 * 0.8
    assert rates == pytest.approx([link, 2 / (1 / link + 1 / network), 4 / (1 / link + 3 / network)])


def test_search_cuts_experts(qwen: ModelConfig) -> None:
    found = search(_run(qwen, ParallelConfig()), DEVICES["h100"], 16)
    assert {candidate.run.parallel.ep for candidate in found} >= {8, 16}
    assert all(candidate.run.parallel.world_size == 16 for candidate in found)


def _run(model: ModelConfig, parallel: ParallelConfig) -> RunConfig:
    train = TrainConfig(seq_length=4096, micro_batch_size=1, global_batch_size=1024)
    return RunConfig(model=model, parallel=parallel, precision=PrecisionConfig(params="bf16"), train=train)


def _mtp(model: ModelConfig) -> int:
    from mbfn.plan.weights import mtp_weights

    return mtp_weights(model, ParallelConfig()).parameters
