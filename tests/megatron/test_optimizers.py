"""SGD and Muon step as written down in plain torch, at every cut; weights have the rates of their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbfn.megatron as megatron
from mbfn.config.optim import MuonConfig, OptimConfig, ParamRule
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.convert import to_megatron
from tests.megatron.mixtures import MIXTURES
from tests.megatron.tiny import config_of, hf_model, loss_mask, micro_batches, rows, run_config, train, weights_of
from tests.ranks import RankError, run_ranks

STEPS = 20
EXACT = MuonConfig(fp32_matmul_prec="highest")
SGD = OptimConfig(optimizer="sgd", lr=0.05, weight_decay=0.1, sgd_momentum=0.8)
MUON = OptimConfig(optimizer="muon", lr=3e-3, weight_decay=0.1, muon=EXACT)
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2, sequence_parallel=True),
    "dp2": ParallelConfig(dp=2, sharding="none"),
    "pp2": ParallelConfig(pp=2),
}


def plain_losses(optim: OptimConfig, variant: str) -> list[float]:
    """The losses of transformers with plain torch's steps on the same batches."""
    model, mask = hf_model(variant), loss_mask()
    step = _muon_step(model, optim) if optim.optimizer == "muon" else _sgd_step(model, optim)
    losses = []
    for number in range(STEPS):
        batch = rows(number)
        each = F.cross_entropy(model(batch[:, :-1]).logits.transpose(1, 2), batch[:, 1:], reduction="none")
        loss = (each * mask).sum() / mask.sum()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        step()
        losses.append(loss.item())
    return losses


def _sgd_step(model: nn.Module, optim: OptimConfig) -> Any:
    matrices = [w for w in model.parameters() if w.dim() > 1]
    vectors = [w for w in model.parameters() if w.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.sgd_momentum, weight_decay=optim.weight_decay).step


def _muon_step(model: nn.Module, optim: OptimConfig) -> Any:
    """Momentum of hidden matrices, made orthogonal by five quintic steps; gate and up are one matrix, as in Megatron.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers (2024), with the coefficients of modded-nanogpt.
    """
    named = dict(model.named_parameters())
    hidden = {name: w for name, w in named.items() if w.dim() == 2 and ".layers." in name}
    rest = [w for name, w in named.items() if name not in hidden]
    groups = [
        {"params": [w for w in rest if w.dim() > 1]},
        {"params": [w for w in rest if w.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay)
    moments = {name: torch.zeros_like(w) for name, w in hidden.items()}

    @torch.no_grad()
    def step() -> None:
        adam.step()
        for names in _matrices(hidden):
            for name in names:
                moments[name].lerp_(hidden[name].grad, 1 - optim.muon.momentum)
            whole = torch.cat([moments[name] for name in names])
            update = _orthogonal(whole) * max(whole.shape) ** 0.5
            for name, part in zip(names, update.split([hidden[n].size(0) for n in names]), strict=True):
                hidden[name].mul_(1 - optim.lr * optim.weight_decay).add_(part, alpha=-optim.lr)

    return step


def _matrices(names: dict[str, Tensor]) -> Iterator[list[str]]:
    for name in names:
        if name.endswith("gate_proj.weight"):
            yield [name, name.replace("gate_proj", "up_proj")]
        elif not name.endswith("up_proj.weight"):
            yield [name]


def _orthogonal(matrix: Tensor) -> Tensor:
    x = matrix / matrix.norm()
    coefficients = (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
    for a, b, c in coefficients:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


@pytest.mark.parametrize("optim", [SGD, MUON], ids=["sgd", "muon"])
def test_twenty_steps_are_those_of_plain_torch(optim: OptimConfig) -> None:
    model = hf_model("tied")
    expected = plain_losses(optim, "tied")
    assert expected[-1] < 0.9 * expected[0]
    for parallel in LAYOUTS.values():
        run = replace(run_config(config_of(model), parallel), optim=optim)
        found = run_ranks(parallel.world_size, train, run, weights_of(model), steps=range(STEPS))
        assert [result.loss for result in found[0][0]] == pytest.approx(expected, abs=1e-3), parallel


@pytest.mark.parametrize(
    ("optim", "before", "after"),
    [
        (SGD, ParallelConfig(), ParallelConfig(tp=2)),
        (MUON, ParallelConfig(dp=2, sharding="none"), ParallelConfig(dp=2, sharding="none")),
        (MUON, ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(pp=2)),
    ],
    ids=["sgd", "muon_dp2", "muon_moved"],
)
def test_a_checkpoint_continues_the_run(
    tmp_path: Path, optim: OptimConfig, before: ParallelConfig, after: ParallelConfig
) -> None:
    model = hf_model("tied")
    runs = [replace(run_config(config_of(model), parallel), optim=optim) for parallel in (before, after)]
    start, kept = weights_of(model), str(tmp_path / "half")
    whole = run_ranks(before.world_size, train, runs[0], start, steps=range(6))[0][0]
    run_ranks(before.world_size, train, runs[0], start, steps=range(3), save_to=kept)
    rest = run_ranks(after.world_size, train, runs[1], None, steps=range(3, 6), load_from=kept)[0][0]
    exact = 0.0 if before == after else 2e-5
    assert [step.loss for step in rest] == pytest.approx([step.loss for step in whole[3:]], abs=exact)


@pytest.mark.slow
def test_experts_spread_over_ranks_step_as_on_one_and_their_state_survives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MIXTURES["qwen3_moe"]().float()
    start, kept = weights_of(model), str(tmp_path / "half")
    single, spread = (
        replace(run_config(config_of(model), parallel), optim=MUON)
        for parallel in (ParallelConfig(), ParallelConfig(ep=2, sharding="none"))
    )
    expected = run_ranks(1, train, single, start, steps=range(6))[0][0]
    run_ranks(2, train, spread, start, steps=range(3), save_to=kept)
    rest = run_ranks(2, train, spread, None, steps=range(3, 6), load_from=kept)[0][0]
    assert [step.loss for step in rest] == pytest.approx([step.loss for step in expected[3:]], abs=1e-4)


RULES = OptimConfig(
    lr=2e-3,
    weight_decay=0.1,
    rules=(
        ParamRule(pattern="embedding.*", lr_mult=0.1),
        ParamRule(pattern="decoder.layers.3.*", lr_mult=0.0, wd_mult=0.0),
        ParamRule(pattern="*.mlp.linear_fc1.weight", wd_mult=0.5),
    ),
)


def _groups(run: RunConfig, weights: dict[str, Tensor], folder: str) -> tuple:
    """Multipliers of this rank's groups before a save and after a load, and how far each weight moved in a step."""
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank)
        models = megatron.build(run, world, own)
        before = {name: value.clone() for name, value in megatron.state_dict(models).items()}
        megatron.train_step(run, world, models, micro_batches(0, run, world.coordinates.dp), lr=run.optim.lr)
        moved = {name: float((w - before[name]).abs().max()) for name, w in megatron.state_dict(models).items()}
        found = [_multipliers(models)]
        megatron.save(folder, run, world, models, {"step": 1})
        again = megatron.build(run, world, own)
        megatron.load(folder, run, world, again)
        return *found, _multipliers(again), moved


def _multipliers(models: megatron.Models) -> list[tuple[float, float, int]]:
    groups = models.optimizer.param_groups
    return sorted((g["lr_mult"], g["wd_mult"], sum(w.numel() for w in g["params"])) for g in groups)


def test_rules_reach_the_groups_and_the_steps_at_every_cut(tmp_path: Path) -> None:
    model, rate = hf_model("tied"), RULES.lr
    run = replace(run_config(config_of(model), ParallelConfig(pp=2)), optim=RULES)
    ranks = run_ranks(2, _groups, run, weights_of(model), str(tmp_path / "saved"))
    for before, after, _ in ranks:
        assert before == after
        assert {(1.0, 1.0), (1.0, 0.0), (1.0, 0.5), (0.1, 1.0), (0.0, 0.0)} == {group[:2] for group in before}
    first, last = ranks[0][2], ranks[1][2]
    assert 0.09 * rate < first["embedding.word_embeddings.weight"] < 0.12 * rate
    assert 0.09 * rate < last["output_layer.weight"] < 0.12 * rate  # the same weight on the last stage
    frozen = {name for name, far in last.items() if far == 0}
    assert frozen == {name for name in last if name.startswith("decoder.layers.1.")}  # the second stage's second is 3
    assert all(far > 0.9 * rate for name, far in first.items() if name.startswith("decoder."))


def test_a_rule_that_fits_nothing_is_refused() -> None:
    model = hf_model("tied")
    optim = OptimConfig(rules=(ParamRule(pattern="decoder.layers.4.*", lr_mult=0.5),))
    run = replace(run_config(config_of(model), ParallelConfig(pp=2)), optim=optim)
    with pytest.raises(RankError, match=r"optim.rules\[0\].pattern: 'decoder.layers.4.\*' fits no weight"):
        run_ranks(2, train, run, weights_of(model), steps=range(1))


FP16 = PrecisionConfig(params="fp16")


def _scaled(run: RunConfig, weights: dict[str, Tensor], folder: str) -> list[tuple[float | None, bool]]:
    """Loss scale and skipping of 8 steps, the optimizer made anew from a checkpoint after the fourth."""
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank)
        models, found = megatron.build(run, world, own), []
        for number in range(8):
            if number == 4:
                megatron.save(folder, run, world, models, {"step": 4})
                models = megatron.build(run, world, own)
                megatron.load(folder, run, world, models)
            batch = micro_batches(number, run, world.coordinates.dp)
            result = megatron.train_step(run, world, models, batch, lr=run.optim.lr)
            found.append((result.loss_scale, result.skipped))
        return found


@pytest.mark.parametrize("sharding", ["zero1", "none"])
def test_fp16_finds_its_scale_and_keeps_it_over_a_checkpoint(tmp_path: Path, sharding: str) -> None:
    model = hf_model("tied")
    settings = {"initial_loss_scale": 2.0**20, "loss_scale_window": 3, "hysteresis": 1}
    run = run_config(config_of(model), ParallelConfig(sharding=sharding), FP16, **settings)
    (steps,) = run_ranks(1, _scaled, run, weights_of(model), str(tmp_path / "saved"))
    scales, skipped = [scale for scale, _ in steps], [skip for _, skip in steps]
    assert scales[0] == 2.0**20
    assert skipped[0]
    assert False in skipped
    assert scales == _expected_scales(skipped, settings)
    assert run_ranks(1, train, run, weights_of(model), steps=range(12))[0][0][-1].loss < 4.6


def _expected_scales(skipped: list[bool], settings: dict[str, Any]) -> list[float]:
    """What the rule of dynamic scaling gives for these overflows: the scale that each step ran with."""
    scale, clean, left, found = settings["initial_loss_scale"], 0, settings["hysteresis"], []
    for overflow in skipped:
        found.append(scale)
        clean, left = (0, left - 1) if overflow else (clean + 1, left)
        if overflow and left <= 0:
            scale /= 2
        if clean == settings["loss_scale_window"]:
            scale, clean, left = scale * 2, 0, settings["hysteresis"]
    return found
