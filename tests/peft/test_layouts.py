"""Adapters train alike at every cut, leave frozen weights bit for bit, and resume bit for bit from their own files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mbfn.megatron as megatron
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.convert import to_megatron
from mbfn.convert.adapters import adapter_to_megatron, adapter_to_peft
from mbfn.peft import LowRankAdaptation, seed_dropout
from mbfn.storage.torch_dist import open_torch_dist
from tests.megatron.tiny import micro_batches
from tests.peft.cases import chosen, made, random_adapter, run_of, train, weights_of
from tests.ranks import run_ranks

STEPS = 3
TP2SP = ParallelConfig(tp=2, sequence_parallel=True)
EXPERTS = ParallelConfig(tp=2, ep=2, sequence_parallel=True)
CASES = (
    ("llama", "canonical", ParallelConfig(tp=2)),
    ("llama", "dora", TP2SP),
    ("llama", "rslora", ParallelConfig(pp=2, vpp=2)),
    ("qwen3_moe", "lora", ParallelConfig(ep=2)),
)
MORE = (
    ("llama", "lora", ParallelConfig(tp=2)),
    ("llama", "canonical", TP2SP),
    ("llama", "query_value", ParallelConfig(tp=4, sequence_parallel=True)),  # more ranks than key/value heads
    ("qwen3_moe", "lora", ParallelConfig(etp=2)),
    ("deepseek_v3", "lora", EXPERTS),
    ("llama", "lora", TP2SP),
    ("llama", "dora", ParallelConfig(tp=2)),
    ("biased", "dora", ParallelConfig(pp=2)),
    ("llama", "lora", ParallelConfig(dp=2)),
    ("llama", "lora", ParallelConfig(cp=2)),
    ("llama", "lora", ParallelConfig(tp=2, pp=2)),
    ("gemma3", "lora", TP2SP),
    ("qwen3_moe", "lora", TP2SP),
    ("qwen3_moe", "lora", ParallelConfig(ep=4)),
    ("qwen3_moe", "lora", ParallelConfig(ep=2, etp=2)),
    ("deepseek_v2_lite", "lora", ParallelConfig(pp=2, ep=2)),
    ("deepseek_v2", "dora", TP2SP),
    ("deepseek_v3", "canonical", TP2SP),
    ("gpt_oss", "lora", ParallelConfig(etp=2, ep=2)),
)


def name_of(value: object) -> str:
    if not isinstance(value, ParallelConfig):
        return str(value)
    sizes = {name: getattr(value, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    return "".join(f"{n}{size}" for n, size in sizes.items() if size > 1) + "sp" * value.sequence_parallel


@pytest.mark.parametrize(
    ("variant", "kind", "parallel"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)], ids=name_of
)
def test_every_cut_trains_alike_and_leaves_frozen_weights(variant: str, kind: str, parallel: ParallelConfig) -> None:
    model, peft, adapters = chosen(variant, kind)
    weights, tensors = weights_of(made(variant)), random_adapter(model, adapters)
    one = run_of(model, peft, ParallelConfig(), weight_decay=0.1)
    ((alone, whole, same),) = run_ranks(1, train, one, weights, steps=range(STEPS), tensors=tensors)
    assert same
    assert alone[-1].loss < alone[0].loss
    run = replace(one, parallel=parallel)
    ranks = run_ranks(parallel.world_size, train, run, weights, steps=range(STEPS), tensors=tensors)
    assert all(same for _, _, same in ranks)
    for results, _, _ in ranks:
        assert [r.loss for r in results] == pytest.approx([r.loss for r in alone], abs=2e-5)
        assert [r.grad_norm for r in results] == pytest.approx([r.grad_norm for r in alone], rel=1e-4)
    expected = dict(adapter_to_peft({0: whole}, model, adapters, parallel=ParallelConfig()))
    states = {rank: state for rank, (_, state, _) in enumerate(ranks)}
    found = dict(adapter_to_peft(states, model, adapters, parallel=parallel))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=0, msg=name)  # Adam follows signs of noise
    for rank, state in states.items():
        again = adapter_to_megatron(found, model, adapters, parallel=parallel, rank=rank)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)


RESUMES = (
    ("llama", "dora", ParallelConfig(tp=2, dp=2), PrecisionConfig()),
    ("qwen3_moe", "lora", ParallelConfig(pp=2, ep=2), PrecisionConfig(params="bf16")),
)


@pytest.mark.parametrize(
    ("variant", "kind", "parallel", "precision"),
    [pytest.param(*RESUMES[0], id="dense"), pytest.param(*RESUMES[1], id="experts", marks=pytest.mark.slow)],
)
def test_a_checkpoint_holds_adapters_alone_and_resumes_bitwise(
    variant: str, kind: str, parallel: ParallelConfig, precision: PrecisionConfig, tmp_path: Path
) -> None:
    model, peft, adapters = chosen(variant, kind)
    weights, place, size = weights_of(made(variant)), tmp_path / "step_2", parallel.world_size
    run = run_of(model, peft, parallel, precision)
    unbroken = run_ranks(size, train, run, weights, steps=range(STEPS))
    run_ranks(size, train, run, weights, steps=range(2), save_to=str(place))
    resumed = run_ranks(size, train, run, weights, steps=range(2, STEPS), load_from=str(place))
    for (results, state, same), (later, again, _) in zip(unbroken, resumed, strict=True):
        assert same
        assert later == results[2:]
        assert all(torch.equal(again[name], state[name]) for name in state)
    with open_torch_dist(place) as held:
        assert all(".adapter." in key for key in held)
        trained = sum(adapter.parameters for adapter in adapters)
        assert sum(held[key].numel() for key in held if not key.startswith("optimizer.")) == trained
    other = replace(run, parallel=ParallelConfig())  # and any other layout goes on from it
    ((moved, _, _),) = run_ranks(1, train, other, weights, steps=range(2, STEPS), load_from=str(place))
    tolerance = 2e-2 if precision.params == "bf16" else 2e-5
    assert [r.loss for r in moved] == pytest.approx([r.loss for r in resumed[0][0]], abs=tolerance)


def test_dropout_is_drawn_by_the_number_of_the_batch_and_again_in_recomputation() -> None:
    model, peft, adapters = chosen("llama", "lora")
    weights, tensors = weights_of(made("llama")), random_adapter(model, adapters)
    plain = run_of(model, peft, ParallelConfig(), weight_decay=0.0)
    dropped = replace(plain, peft=replace(peft, dropout=0.3))
    again = replace(dropped, train=replace(dropped.train, recompute="full"))
    whole, resumed, recomputed, without = (
        _losses(run, weights, tensors, range(start, 3))
        for run, start in ((dropped, 0), (dropped, 2), (again, 0), (plain, 0))
    )
    assert resumed == whole[2:]
    assert recomputed == whole
    assert without != whole


def _losses(run: RunConfig, weights: dict, tensors: dict, steps: range) -> list[float]:
    """The losses of batches that change nothing."""
    with megatron.open_world(run.parallel, device="cpu") as world:
        own = to_megatron(weights, run.model, parallel=run.parallel)
        models = megatron.build(run, world, own, LowRankAdaptation(run, world, tensors))
        found = []
        for step in steps:
            seed_dropout(run, world, step)
            found.append(megatron.train_step(run, world, models, micro_batches(step, run, 0), lr=0.0).loss)
        return found


def test_nothing_is_kept_for_frozen_weights() -> None:
    model, peft, adapters = chosen("llama", "lora")
    ((held, optimised),) = run_ranks(1, _held, run_of(model, peft, ParallelConfig()), weights_of(made("llama")))
    assert held == optimised == sum(adapter.parameters for adapter in adapters)


def _held(run: RunConfig, weights: dict) -> tuple[int, int]:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, run.model, parallel=run.parallel)
        models = megatron.build(run, world, own, LowRankAdaptation(run, world))
        buffers = sum(p.numel() for ddp in models.ddp for buffer in ddp.buffers for p in buffer.params)
        return buffers, sum(p.numel() for group in models.optimizer.param_groups for p in group["params"])
