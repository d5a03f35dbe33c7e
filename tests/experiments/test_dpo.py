"""Preferences are learned as written out over transformers, through the loss that `experiments/dpo.py` gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import mbfn.megatron as megatron
from mbfn.config.loss import FunctionLoss
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import InitConfig
from mbfn.convert import to_hf
from mbfn.train.losses import make_loss
from tests.megatron.tiny import (
    config_of,
    gradients_of,
    hf_model,
    loss_mask,
    micro_batches,
    rows,
    run_config,
    weights_of,
)
from tests.ranks import run_ranks

BETA, SMOOTHING = 0.3, 0.1
LAYOUTS = {
    "tp2pp2": ParallelConfig(tp=2, pp=2),
    "cp2": ParallelConfig(cp=2),
    "dp2": ParallelConfig(dp=2),
}


@pytest.mark.parametrize("layout", [x if x != "dp2" else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS])
def test_pairs_are_learned_from_as_written_out(tmp_path: Path, layout: str) -> None:
    reference, model = hf_model("llama"), hf_model("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    reference.save_pretrained(tmp_path)
    margin, loss = _written_out(model, reference)
    loss.backward()
    run = run_config(config_of(model), replace(LAYOUTS[layout], sharding="none"))
    own = FunctionLoss(path="dpo.py:dpo", settings=(f"beta:{BETA}", f"label_smoothing:{SMOOTHING}"))
    run = replace(run, init=InitConfig(hf=str(tmp_path)), loss=own)
    batches = micro_batches(0, replace(run, parallel=ParallelConfig()), 0)
    ranks = run_ranks(run.parallel.world_size, gradients_of, run, weights_of(model), batches, _loss)
    found = ranks[0][0]
    assert found.mean == pytest.approx(loss.item(), abs=1e-5)
    expected = {"accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item()}
    assert found.metrics == pytest.approx(expected, abs=1e-4)
    whole = dict(to_hf({r: gradients for r, (_, gradients) in enumerate(ranks)}, run.model, parallel=run.parallel))
    given = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    largest = max(float(gradient.norm()) for gradient in given.values())
    apart = {name: float((whole[name] - given[name]).norm()) for name in given}
    assert max(apart.values()) < 5e-5 * largest, apart


def _loss(run: RunConfig, world: megatron.World) -> megatron.Loss:
    return make_loss(run, world)


def _written_out(model: PreTrainedModel, reference: PreTrainedModel) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        before = _answers(reference)
    gained = _answers(model) - before
    margin = BETA * (gained[0::2] - gained[1::2])
    return margin.detach(), -((1 - SMOOTHING) * F.logsigmoid(margin) + SMOOTHING * F.logsigmoid(-margin)).mean()


def _answers(model: PreTrainedModel) -> Tensor:
    batch = rows(0)
    log_p = model(batch[:, :-1]).logits.log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
    return (log_p * loss_mask()).sum(1)
