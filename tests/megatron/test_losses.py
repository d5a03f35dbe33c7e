"""Losses against plain torch and transformers: weights of tokens, a teacher's scores and layers, at every cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import mbfn.megatron as megatron
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.convert import to_hf, to_megatron
from mbfn.megatron.distill import Distillation, distillation
from mbfn.megatron.divergence import Shard, best, divergence, label_losses, sparse_divergence
from mbfn.megatron.frozen import open_frozen
from mbfn.megatron.losses import Loss
from mbfn.megatron.step import Measured
from tests.megatron.mixtures import mixture
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

VOCABULARY, PADDED = 10, 12  # the second rank's last two rows are padding
Gradients = dict[str, Tensor]


def test_divergences_of_a_cut_vocabulary_are_those_of_the_whole() -> None:
    scores, teacher = (torch.randn(2, 3, PADDED, generator=torch.Generator().manual_seed(i)) * 3 for i in (1, 2))
    labels = torch.tensor([[0, 5, 6], [9, 3, 7]])
    expected = _whole_divergences(scores, teacher, labels)
    for size in (1, 2):
        ranks = run_ranks(size, _cut_divergences, ParallelConfig(tp=size), scores, teacher, labels)
        for name, (values, gradient) in expected.items():
            for found, _ in (rank[name] for rank in ranks):
                torch.testing.assert_close(found, values, atol=2e-6, rtol=1e-6)
            joined = torch.cat([rank[name][1] for rank in ranks], dim=-1)[..., :VOCABULARY]
            torch.testing.assert_close(joined, gradient, atol=2e-6, rtol=1e-6)


def _whole_divergences(scores: Tensor, teacher: Tensor, labels: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    leaf = scores[..., :VOCABULARY].clone().requires_grad_()
    values, ids = teacher[..., :VOCABULARY].topk(4, dim=-1)
    log_p = (leaf / 2.5).log_softmax(-1)
    target = (teacher[..., :VOCABULARY] / 2.5).log_softmax(-1)
    some = (values / 2.5).log_softmax(-1)
    losses = {
        "all": F.kl_div(log_p, target, reduction="none", log_target=True).sum(-1) * 2.5**2,
        "some": F.kl_div(log_p.gather(-1, ids), some, reduction="none", log_target=True).sum(-1) * 2.5**2,
        "labels": F.cross_entropy(leaf.transpose(1, 2), labels, reduction="none"),
    }
    return {
        name: (x.detach(), torch.autograd.grad(x.square().sum(), leaf, retain_graph=True)[0])
        for name, x in losses.items()
    }


def _cut_divergences(
    parallel: ParallelConfig, scores: Tensor, teacher: Tensor, labels: Tensor
) -> Mapping[str, tuple[Tensor, Tensor]]:
    with megatron.open_world(parallel, device="cpu", timeout_s=60) as world:
        shard = Shard(size=VOCABULARY, group=world.groups.tp)
        own, taught = (x.chunk(parallel.tp, dim=-1)[world.coordinates.tp].contiguous() for x in (scores, teacher))
        own.requires_grad_()
        values, ids = best(taught, 4, shard)
        losses = {
            "all": divergence(own, taught, shard, temperature=2.5),
            "some": sparse_divergence(own, values, ids, shard, temperature=2.5),
            "labels": label_losses(own, labels, shard),
        }
        return {name: (x.detach(), torch.autograd.grad(x.square().sum(), own)[0]) for name, x in losses.items()}


def test_the_mean_of_samples_means_is_exact_at_every_cut() -> None:
    model, mask = hf_model("llama"), loss_mask()
    batch, weights = rows(0), mask / mask.sum(1, keepdim=True)
    losses = F.cross_entropy(model(batch[:, :-1]).logits.transpose(1, 2), batch[:, 1:], reduction="none")
    loss = torch.stack([(row * seen).sum() / seen.sum() for row, seen in zip(losses, mask, strict=True)]).mean()
    loss.backward()
    for parallel in (ParallelConfig(), ParallelConfig(dp=2), ParallelConfig(cp=2)):
        run = run_config(config_of(model), replace(parallel, sharding="none"))
        parts = zip(_batches(run), weights.split(2), strict=True)
        batches = [part | {"loss_mask": seen} for part, seen in parts]
        ranks = run_ranks(parallel.world_size, gradients_of, run, weights_of(model), batches)
        assert {found.tokens for found, _ in ranks} == {int(mask.sum())}
        assert ranks[0][0].mean == pytest.approx(loss.item(), abs=1e-6)
        _assert_gradients(ranks, run, model)


def test_the_balance_of_experts_counts_the_same_at_every_scale_of_the_weights() -> None:
    reference = mixture("qwen3_moe")
    model = config_of(reference)
    assert model.moe is not None
    model = replace(model, moe=replace(model.moe, moe_aux_loss_coeff=0.1))
    run, weights = run_config(model, ParallelConfig(sharding="none")), weights_of(reference)
    small = [batch | {"loss_mask": batch["loss_mask"] / 40} for batch in _batches(run)]
    ((expected, gradients),) = run_ranks(1, gradients_of, run, weights, _batches(run))
    ((found, own),) = run_ranks(1, gradients_of, run, weights, small)
    assert found.mean == pytest.approx(expected.mean, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-6, rtol=1e-4)


SETTINGS = {
    "all": Distillation(temperature=2.0, token_share=0.3),
    "best": Distillation(temperature=1.5, top_k=5),
    "layers": Distillation(token_share=0.5, hidden_layers=((0, 1), (3, 2)), hidden_weight=0.7),
    "same": Distillation(hidden_layers=((1, 1), (2, 2)), hidden_weight=0.7),
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("all", "tp2pp2"),
        ("best", "tp2pp2"),
        ("layers", "pp2"),
        ("layers", "tp2sp"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("all", "cp2"), ("best", "pp1"), ("layers", "tp2")]),
        *(pytest.param(kind, "pp2vpp2", marks=pytest.mark.slow) for kind in ("all", "same")),
    ],
)
def test_a_teacher_is_learned_from_as_in_transformers(kind: str, layout: str) -> None:
    parallel = LAYOUTS[layout]
    student, teacher, settings = hf_model("llama"), _teacher(), SETTINGS[kind]
    loss, metrics = _plain_distillation(student, teacher, settings)
    loss.backward()
    run = run_config(config_of(student), replace(parallel, sharding="none"))
    make = partial(_distillation, settings, weights_of(teacher))
    ranks = run_ranks(parallel.world_size, gradients_of, run, weights_of(student), _batches(run), make)
    assert all(found == ranks[0][0] for found, _ in ranks)
    assert ranks[0][0].mean == pytest.approx(loss.item(), abs=1e-5)
    assert ranks[0][0].metrics == pytest.approx(metrics, abs=1e-5)
    _assert_gradients(ranks, run, student)


LAYOUTS = {
    "pp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "tp2pp2": ParallelConfig(tp=2, pp=2),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
    "cp2": ParallelConfig(cp=2),
}


@cache
def _teacher() -> PreTrainedModel:
    """The same architecture, other weights."""
    model = hf_model("llama")
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.1)
    return model


def _distillation(settings: Distillation, weights: Mapping[str, Tensor], run: RunConfig, world: megatron.World) -> Loss:
    own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank)
    return distillation(settings, open_frozen(run, world, own), vocab_size=run.model.vocab_size)


def _plain_distillation(
    student: PreTrainedModel, teacher: PreTrainedModel, settings: Distillation
) -> tuple[Tensor, dict[str, float]]:
    batch, mask, t = rows(0), loss_mask(), settings.temperature
    said, own = _outputs(student, batch[:, :-1])
    with torch.no_grad():
        taught, other = _outputs(teacher, batch[:, :-1])
    target, log_p = taught / t, (said / t).log_softmax(-1)
    if settings.top_k:
        target, ids = target.topk(settings.top_k, dim=-1)
        log_p = log_p.gather(-1, ids)
    parts = {
        "distillation": F.kl_div(log_p, target.log_softmax(-1), reduction="none", log_target=True).sum(-1) * t**2,
        "cross_entropy": F.cross_entropy(said.transpose(1, 2), batch[:, 1:], reduction="none"),
    }
    total = (1 - settings.token_share) * parts["distillation"] + settings.token_share * parts["cross_entropy"]
    if settings.hidden_layers:
        apart = [(own[i] - other[j]).square().mean(-1) for i, j in settings.hidden_layers]
        parts["hidden"] = torch.stack(apart).sum(0)
        total = total + settings.hidden_weight * parts["hidden"]
    means = {name: ((part * mask).sum() / mask.sum()).item() for name, part in parts.items()}
    return (total * mask).sum() / mask.sum(), means


def _outputs(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what each layer gives: transformers' own list of hidden states has the last one normed."""
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: hidden.append(out)) for layer in model.model.layers]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits, hidden


def _batches(run: RunConfig) -> list[dict[str, Tensor]]:
    """All micro-batches of a step, whichever replica's."""
    return micro_batches(0, replace(run, parallel=ParallelConfig()), 0)


def _assert_gradients(ranks: list[tuple[Measured, Gradients]], run: RunConfig, model: PreTrainedModel) -> None:
    found = dict(to_hf({r: own for r, (_, own) in enumerate(ranks)}, run.model, parallel=run.parallel))
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    apart = {name: float((found[name] - expected[name]).norm()) for name in expected}
    assert max(apart.values()) < 2e-5 * largest, apart
