"""Checkpoints of mixtures of experts: resumed bitwise, read by other layouts, converted both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mbfn
import mbfn.megatron as megatron
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.storage.jobs import checkpoint_to_hf, hf_to_checkpoint
from tests.megatron.mixtures import mixture
from tests.megatron.tiny import config_of, run_config, train, weights_of
from tests.ranks import run_ranks

SPREAD = ParallelConfig(pp=2, ep=2)
OTHERS = {
    "tp1": ParallelConfig(),  # one optimizer, where the spread experts have their own
    "ep2etp2": ParallelConfig(tp=2, sequence_parallel=True, ep=2, etp=2),
}
STOP, END = 2, 4


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A run of DeepSeek-V3, its checkpoint after `STOP` steps and every rank's results and weights after `END`."""
    reference, place = mixture("deepseek_v3"), tmp_path_factory.mktemp("checkpoint") / "stopped"
    run = run_config(config_of(reference), SPREAD)
    run_ranks(4, train, run, weights_of(reference), steps=range(STOP), save_to=str(place))
    return place, run_ranks(4, train, run, weights_of(reference), steps=range(END))


def test_a_resumed_run_is_bitwise_the_whole_one(stopped: tuple[Path, list]) -> None:
    place, unbroken = stopped
    run = run_config(config_of(mixture("deepseek_v3")), SPREAD)
    resumed = run_ranks(4, train, run, None, steps=range(STOP, END), load_from=str(place))
    for (results, state), (later, again) in zip(unbroken, resumed, strict=True):
        assert later == results[STOP:]
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("layout", ["tp1", pytest.param("ep2etp2", marks=pytest.mark.slow)])
def test_another_layout_continues_the_run(stopped: tuple[Path, list], layout: str) -> None:
    place, unbroken = stopped
    run = run_config(config_of(mixture("deepseek_v3")), OTHERS[layout])
    ranks = run_ranks(run.parallel.world_size, train, run, None, steps=range(STOP, END), load_from=str(place))
    whole = unbroken[0][0][STOP:]
    assert [r.loss for r in ranks[0][0]] == pytest.approx([r.loss for r in whole], abs=2e-6)
    assert [r.grad_norm for r in ranks[0][0]] == pytest.approx([r.grad_norm for r in whole], rel=2e-5)


@pytest.mark.slow
def test_one_optimizer_becomes_two(tmp_path: Path) -> None:
    model, place = config_of(mixture("deepseek_v3")), str(tmp_path / "stopped")
    alone = run_config(model, ParallelConfig())
    ((whole, _),) = run_ranks(1, train, alone, None, steps=range(END))
    run_ranks(1, train, alone, None, steps=range(STOP), save_to=place)
    run = run_config(model, SPREAD)
    ranks = run_ranks(4, train, run, None, steps=range(STOP, END), load_from=place)
    assert [r.loss for r in ranks[0][0]] == pytest.approx([r.loss for r in whole[STOP:]], abs=2e-6)


def test_a_saved_run_exports(stopped: tuple[Path, list], tmp_path: Path) -> None:
    place, _ = stopped
    model = config_of(mixture("deepseek_v3"))
    checkpoint_to_hf(place, tmp_path / "hf")
    states = dict(enumerate(run_ranks(4, _loaded, run_config(model, SPREAD), place)))
    wanted = dict(mbfn.to_hf(states, model, parallel=SPREAD))
    with mbfn.open_hf(tmp_path / "hf") as found:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v3"])
def test_a_converted_model_loads_at_any_layout(variant: str, tmp_path: Path) -> None:
    reference = mixture(variant)
    reference.save_pretrained(tmp_path / "hf")
    hf_to_checkpoint(tmp_path / "hf", tmp_path / "megatron", ParallelConfig(tp=2, ep=4))
    model = mbfn.model_from_hf(tmp_path / "hf")
    with mbfn.open_hf(tmp_path / "hf") as wanted:
        for parallel in (SPREAD, OTHERS["ep2etp2"]):
            ranks = run_ranks(parallel.world_size, _loaded, run_config(model, parallel), tmp_path / "megatron")
            found = dict(mbfn.to_hf(dict(enumerate(ranks)), model, parallel=parallel))
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _loaded(run: RunConfig, source: Path) -> Mapping[str, Tensor]:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        chunks = megatron.build_model(run, world, None)
        megatron.load_model(source, world, chunks)
        return {name: value.detach().clone() for name, value in megatron.chunk_tensors(chunks).items()}
