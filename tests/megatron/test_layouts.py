"""Every layout trains the same model: losses and gradient norms of thirty updates are those of one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert import to_hf
from tests.megatron.mixtures import MIXTURES, mixture
from tests.megatron.tiny import config_of, hf_model, run_config, train, weights_of
from tests.ranks import run_ranks

TP2SP = ParallelConfig(tp=2, sequence_parallel=True)
LAYOUTS: Mapping[str, ParallelConfig] = {
    "tp2": ParallelConfig(tp=2),
    "tp2sp": TP2SP,
    "pp2": ParallelConfig(pp=2),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
    "pp4vpp2": ParallelConfig(pp=4, vpp=2),
    "pp4vpp2_batched": ParallelConfig(pp=4, vpp=2, overlap_p2p_comm=False),
    "pp2_first3": ParallelConfig(pp=2, num_layers_in_first_pipeline_stage=3),
    "pp2_written": ParallelConfig(pp=2, pipeline_model_parallel_layout="Et*3|tL"),
    "pp2vpp2_empty": ParallelConfig(pp=2, vpp=2, pipeline_model_parallel_layout="E|ttt|t|L"),
    "pp2_further": ParallelConfig(pp=2, pipeline_model_parallel_layout="Ettt|tmL"),
    "cp2": ParallelConfig(cp=2),
    "cp4_levels": ParallelConfig(cp=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=(2, 2)),
    "dp2": ParallelConfig(dp=2),
    "dp2_whole": ParallelConfig(dp=2, sharding="none"),
    "dp4_copies": ParallelConfig(dp=4, num_distributed_optimizer_instances=2),
    "ep2": ParallelConfig(ep=2),
    "ep2_gathered": ParallelConfig(ep=2, moe_token_dispatcher_type="allgather"),
    "ep2dp4_copies": ParallelConfig(ep=2, dp=4, num_distributed_optimizer_instances=2),
    "tp2ep2": replace(TP2SP, ep=2),
    "etp2": replace(TP2SP, etp=2),
    "ep2etp2": replace(TP2SP, ep=2, etp=2),
    "pp2ep2": ParallelConfig(pp=2, ep=2),
    "tp2pp2sp": replace(TP2SP, pp=2),
    "tp2cp2sp": replace(TP2SP, cp=2),
    "tp2pp2dp2": ParallelConfig(tp=2, pp=2, dp=2),
    "tp2pp2dp2sp": replace(TP2SP, pp=2, dp=2),
}
MODELS = ("dense", "moe", "mla", "mtp")
ALL = ("tp2", "tp2sp", "pp2", "pp4vpp2", "cp2", "dp2", "ep2", "ep2etp2", "tp2pp2dp2", "tp2pp2dp2sp")
STEPS, FEW = 30, 4
LR = 5e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at a layout, and how far it may be from one process, relatively."""

    model: str
    layout: str
    steps: int = STEPS
    loss: float = 1e-6
    norm: float = 2e-5


QUICK = (
    Case(model="dense", layout="tp2"),
    Case(model="dense", layout="tp2sp"),
    Case(model="dense", layout="pp4vpp2"),
    Case(model="dense", layout="cp2"),
    Case(model="dense", layout="dp2"),
    Case(model="dense", layout="tp2pp2dp2"),
    Case(model="moe", layout="ep2"),
    Case(model="mla", layout="tp2sp", steps=FEW),
    Case(model="mla", layout="pp2ep2", steps=FEW),
    Case(model="mtp", layout="pp2", steps=FEW),
    Case(model="moe", layout="ep2etp2", steps=FEW),
    Case(model="olmoe", layout="tp2sp", steps=FEW),
    Case(model="gpt_oss", layout="tp2pp2sp", steps=FEW),
    Case(model="gpt_oss", layout="cp2", steps=FEW),
    Case(model="gpt_oss", layout="ep2etp2", steps=FEW),
    Case(model="gemma2", layout="tp2", steps=FEW),
    Case(model="gemma2_biased", layout="tp2pp2sp", steps=FEW),
    Case(model="gemma3", layout="cp2", steps=FEW),
    Case(model="dense", layout="pp2vpp2_empty", steps=FEW),
    Case(model="mtp", layout="pp2_further", steps=FEW),
    Case(model="dense", layout="pp2_first3", steps=FEW),
    Case(model="dense", layout="dp2_whole", steps=FEW),
    Case(model="dense", layout="dp4_copies", steps=FEW),
    Case(model="moe", layout="ep2_gathered", steps=FEW),
)
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt_oss", "llama", "attention_bias")
SLOW = (
    *(Case(model=model, layout=layout) for layout in ALL for model in MODELS),
    *(Case(model=model, layout=layout, steps=FEW) for layout in ("tp2pp2sp", "cp2") for model in FAMILIES),
    *(Case(model=model, layout=layout, steps=FEW) for layout in ("tp2ep2", "pp2vpp2", "cp2") for model in MIXTURES),
    *(Case(model="dense", layout=layout) for layout in ("pp4vpp2_batched", "pp2_written", "cp4_levels", "tp2cp2sp")),
    *(Case(model="moe", layout=layout) for layout in ("etp2", "ep2dp4_copies", "tp2cp2sp")),
    *(Case(model="gpt_oss", layout=layout) for layout in ("etp2", "tp2ep2")),
)


def _cases() -> Iterator[Any]:
    seen = set()
    for case in (*QUICK, *SLOW):
        name = f"{case.model}-{case.layout}"
        if _fits(case) and (name, case.steps) not in seen:
            seen.add((name, case.steps))
            marks = [] if case in QUICK else [pytest.mark.slow]
            yield pytest.param(case, id=f"{name}-{case.steps}", marks=marks)


def _fits(case: Case) -> bool:
    """Whether the pair is one: experts train at tp only where the sequence is cut, and a dense model has none."""
    parallel, experts = LAYOUTS[case.layout], case.model in (*MODELS[1:], *MIXTURES, "gpt_oss")
    whole = parallel.tp > 1 and not parallel.sequence_parallel
    return not whole if experts else parallel.ep == parallel.etp == 1


@pytest.mark.parametrize("case", _cases())
def test_it_trains_as_one_process(case: Case) -> None:
    parallel = LAYOUTS[case.layout]
    model, weights = _model(case.model, deep=parallel.pp * parallel.vpp == 8)
    ranks = run_ranks(parallel.world_size, train, run_config(model, parallel, lr=LR), weights, steps=range(case.steps))
    expected, states = _alone(case.model, case.steps, deep=parallel.pp * parallel.vpp == 8)
    assert all(found == ranks[0][0] for found, _ in ranks)
    for name, bound in (("loss", case.loss), ("grad_norm", case.norm)):
        apart = [abs(getattr(a, name) / getattr(b, name) - 1) for a, b in zip(ranks[0][0], expected, strict=True)]
        assert max(apart) < bound, f"{name}: {apart}"
    if model.moe is not None and model.moe.moe_router_enable_expert_bias:
        one, many = (
            dict(to_hf(held, model, parallel=cut))
            for held, cut in ((states, ParallelConfig()), (dict(enumerate(state for _, state in ranks)), parallel))
        )
        moved = [name for name in one if name.endswith("e_score_correction_bias")]  # steps of a fixed size by loads
        assert moved
        assert all(torch.equal(one[name], many[name]) for name in moved)


@cache
def _alone(name: str, steps: int, *, deep: bool) -> tuple[list[megatron.StepResult], dict[int, dict[str, Tensor]]]:
    """The updates of one process and its weights after them."""
    model, weights = _model(name, deep=deep)
    run = run_config(model, ParallelConfig(), lr=LR)
    ((results, state),) = run_ranks(1, train, run, weights, steps=range(steps))
    assert steps < STEPS or results[-1].loss < 0.85 * results[0].loss
    return results, {0: state}


@cache
def _model(name: str, *, deep: bool) -> tuple[ModelConfig, dict[str, Tensor] | None]:
    """A model and its weights; twice as deep with random ones."""
    sources = {"dense": "tied", "moe": "qwen3_moe", "mla": "deepseek_v3", "mtp": "deepseek_v3"}
    variant = sources.get(name, name)
    reference = mixture(variant) if variant in MIXTURES else hf_model(variant)
    model = config_of(reference)
    if model.moe is not None:
        model = replace(model, moe=replace(model.moe, moe_aux_loss_coeff=0.1))
    if name == "mtp":
        return replace(model, mtp_num_layers=1, num_layers=8 if deep else 4), None
    return (replace(model, num_layers=8), None) if deep else (model, weights_of(reference))
