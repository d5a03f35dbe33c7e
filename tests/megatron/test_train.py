"""Fifty steps are the same fifty steps: in transformers, in one process, and at every cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.convert import to_hf, to_megatron
from tests.megatron.tiny import config_of, hf_model, loss_mask, micro_batches, plain_loop, run_config, train, weights_of
from tests.ranks import RankError, run_ranks

STEPS = 50
Start = tuple[ModelConfig, dict[str, Tensor]]


@pytest.fixture(scope="module")
def start() -> Start:
    model = hf_model("tied")
    return config_of(model), weights_of(model)


@pytest.fixture(scope="module")
def single(start: Start) -> list[megatron.StepResult]:
    model, weights = start
    ((results, _),) = run_ranks(1, train, run_config(model, ParallelConfig()), weights, steps=range(STEPS))
    assert results[-1].loss < 0.75 * results[0].loss
    return results


def test_one_process_trains_as_transformers_does(start: Start, single: list[megatron.StepResult]) -> None:
    expected = plain_loop(hf_model("tied"), steps=STEPS)
    assert [result.loss for result in single] == pytest.approx([loss for loss, _ in expected], abs=1e-3)
    assert [result.grad_norm for result in single[:5]] == pytest.approx([norm for _, norm in expected[:5]], rel=1e-4)
    assert {result.tokens for result in single} == {int(loss_mask().sum())}
    assert not any(result.skipped for result in single)


def test_overlapped_reduce_and_gather_change_nothing(start: Start) -> None:
    model, weights = start
    runs = [
        run_config(model, ParallelConfig(dp=2), overlap_grad_reduce=overlap, overlap_param_gather=overlap)
        for overlap in (False, True)
    ]
    apart, overlapped = (run_ranks(2, train, run, weights, steps=range(4))[0] for run in runs)
    assert overlapped[0] == apart[0]
    assert all(torch.equal(overlapped[1][name], apart[1][name]) for name in apart[1])


def test_random_weights_are_one_model_at_every_cut(start: Start) -> None:
    model = start[0]
    made = []
    for parallel in (ParallelConfig(), ParallelConfig(tp=2, pp=2), ParallelConfig(pp=2, vpp=2)):
        ranks = run_ranks(parallel.world_size, train, run_config(model, parallel), None, steps=range(0))
        states = {rank: state for rank, (_, state) in enumerate(ranks)}
        made.append(dict(to_hf(states, model, parallel=parallel)))
    first = made[0]
    assert all(torch.equal(weights[name], first[name]) for weights in made for name in first)
    scale = model.init_method_std / (2 * model.num_layers) ** 0.5
    assert first["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(scale, rel=0.05)
    assert first["model.layers.1.mlp.up_proj.weight"].std().item() == pytest.approx(model.init_method_std, rel=0.05)
    assert first["model.norm.weight"].unique().tolist() == [1.0]


def test_evaluation_measures_and_changes_nothing(start: Start, single: list[megatron.StepResult]) -> None:
    model, weights = start
    for parallel in (ParallelConfig(), ParallelConfig(pp=2, vpp=2)):
        for loss, before, after in run_ranks(parallel.world_size, _evaluate, run_config(model, parallel), weights):
            assert loss == pytest.approx(single[0].loss, abs=1e-6)
            assert all(torch.equal(after[name], before[name]) for name in before)


def _evaluate(run: RunConfig, weights: Mapping[str, Tensor]) -> tuple:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank)
        models = megatron.build(run, world, own)
        before = {name: value.clone() for name, value in megatron.state_dict(models).items()}
        loss = megatron.eval_step(run, world, models, micro_batches(0, run, world.coordinates.dp))
        return loss, before, megatron.state_dict(models)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda w: w.pop("decoder.layers.2.mlp.linear_fc2.weight"),
            r"layers\.2\.mlp\.linear_fc2\.weight: the mod",
        ),
        (lambda w: w.update(extra=torch.ones(1)), "extra: the model has no such weight"),
        (
            lambda w: w.update({"decoder.final_layernorm.weight": torch.ones(3)}),
            r"final_layernorm\.weight: expected shape \(48,\), found \(3,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(start: Start, spoil: Callable[[dict], object], message: str) -> None:
    model, weights = start
    with pytest.raises(RankError, match=f"ConversionError: .*{message}"):
        run_ranks(1, _build_spoilt, run_config(model, ParallelConfig()), weights, spoil)


def _build_spoilt(run: RunConfig, weights: Mapping[str, Tensor], spoil: Callable[[dict], object]) -> None:
    with megatron.open_world(run.parallel, device="cpu") as world:
        own = dict(to_megatron(weights, run.model, parallel=run.parallel))
        spoil(own)
        megatron.build(run, world, own)


def test_clipping_off_still_measures_the_norm(start: Start, single: list[megatron.StepResult]) -> None:
    model, weights = start
    run = run_config(model, ParallelConfig(), clip_grad=0.0)
    ((results, _),) = run_ranks(1, train, run, weights, steps=range(2))
    assert results[0].grad_norm == pytest.approx(single[0].grad_norm, rel=1e-6)
    assert single[0].grad_norm > 1  # so that the clipped run took another step
    assert results[1].loss != single[1].loss
