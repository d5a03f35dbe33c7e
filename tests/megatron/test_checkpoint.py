"""A resumed run is the run that never stopped, bit for bit; any layout reads any other's; bad input is one line."""

from __future__ import annotations

import pickle
import resource
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig, Sharding
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.convert import to_hf
from tests.megatron.tiny import config_of, hf_model, run_config, train, weights_of
from tests.ranks import RankError, run_ranks

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
    "tp2pp2": ParallelConfig(tp=2, pp=2),
    "dp2": ParallelConfig(dp=2),
    "pp2dp2": ParallelConfig(pp=2, dp=2),
}
STOP, END = 3, 6
Start = tuple[ModelConfig, dict[str, Tensor]]


@pytest.fixture(scope="module")
def start() -> Start:
    model = hf_model("tied")
    return config_of(model), weights_of(model)


@pytest.fixture(scope="module")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after `STOP` steps at tp2pp2 with the distributed optimizer."""
    target = tmp_path_factory.mktemp("checkpoint") / "stopped"
    run_ranks(4, train, run_config(start[0], LAYOUTS["tp2pp2"]), start[1], steps=range(STOP), save_to=str(target))
    return target


@pytest.fixture(scope="module")
def whole(start: Start) -> list[megatron.StepResult]:
    ((results, _),) = run_ranks(1, train, run_config(start[0], ParallelConfig()), start[1], steps=range(END))
    return results


@pytest.mark.parametrize("distributed", [True, False], ids=["zero1", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_whole_one(start: Start, tmp_path: Path, layout: str, distributed: bool) -> None:
    model, weights = start
    run = run_config(model, replace(LAYOUTS[layout], sharding="zero1" if distributed else "none"))
    size, place = run.parallel.world_size, str(tmp_path / "step_3")
    unbroken = run_ranks(size, train, run, weights, steps=range(END))
    run_ranks(size, train, run, weights, steps=range(STOP), save_to=place)
    resumed = run_ranks(size, train, run, None, steps=range(STOP, END), load_from=place)
    for (results, state), (later, again) in zip(unbroken, resumed, strict=True):
        assert later == results[STOP:]
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("distributed", [True, False], ids=["zero1", "plain"])
def test_a_bf16_run_resumes_bitwise_and_stays_near_fp32(
    start: Start, whole: list[megatron.StepResult], tmp_path: Path, distributed: bool
) -> None:
    sharding: Sharding = "zero1" if distributed else "none"
    parallel, place = ParallelConfig(tp=2, sequence_parallel=True, sharding=sharding), str(tmp_path / "step_3")
    bf16 = PrecisionConfig(params="bf16")
    run = run_config(start[0], parallel, bf16)
    unbroken = run_ranks(2, train, run, start[1], steps=range(END))
    run_ranks(2, train, run, start[1], steps=range(STOP), save_to=place)
    resumed = run_ranks(2, train, run, None, steps=range(STOP, END), load_from=place)
    assert resumed[0][0] == unbroken[0][0][STOP:]
    assert {value.dtype for value in resumed[1][1].values()} == {torch.bfloat16}
    assert all(torch.equal(resumed[1][1][name], value) for name, value in unbroken[1][1].items())
    assert [r.loss for r in unbroken[0][0]] == pytest.approx([r.loss for r in whole], abs=2e-2)
    assert [r.loss for r in unbroken[0][0]] != [r.loss for r in whole]


@pytest.mark.parametrize("layout", ["tp1", "pp2vpp2", "dp2"])
def test_another_layout_continues_the_run(
    start: Start, stopped: Path, whole: list[megatron.StepResult], layout: str
) -> None:
    run = run_config(start[0], LAYOUTS[layout])
    ranks = run_ranks(run.parallel.world_size, train, run, None, steps=range(STOP, END), load_from=str(stopped))
    assert [r.loss for r in ranks[0][0]] == pytest.approx([r.loss for r in whole[STOP:]], abs=5e-6)


def test_a_checkpoint_before_the_first_step_is_whole(start: Start, tmp_path: Path) -> None:
    run, place = run_config(start[0], ParallelConfig()), str(tmp_path / "step_0")
    run_ranks(1, train, run, start[1], steps=range(0), save_to=place)
    ((fresh, _),) = run_ranks(1, train, run, start[1], steps=range(2))
    ((resumed, _),) = run_ranks(1, train, run, None, steps=range(2), load_from=place)
    assert resumed == fresh


def test_weights_alone_load_at_another_layout(start: Start, stopped: Path) -> None:
    expected = run_ranks(4, train, run_config(start[0], LAYOUTS["tp2pp2"]), start[1], steps=range(STOP))
    states = {rank: state for rank, (_, state) in enumerate(expected)}
    want = dict(to_hf(states, start[0], parallel=LAYOUTS["tp2pp2"]))
    run = run_config(start[0], LAYOUTS["pp2vpp2"])
    got = dict(enumerate(run_ranks(2, _weights_alone, run, stopped)))
    found = dict(to_hf(got, start[0], parallel=run.parallel))
    assert all(torch.equal(found[name], want[name]) for name in want)


def _weights_alone(run: RunConfig, source: Path) -> Mapping[str, Tensor]:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        chunks = megatron.build_model(run, world, None)
        megatron.load_model(source, world, chunks)
        return {name: value.detach().clone() for name, value in megatron.chunk_tensors(chunks).items()}


def test_a_newer_checkpoint_replaces_the_one_before(start: Start, tmp_path: Path) -> None:
    run, place = run_config(start[0], ParallelConfig()), str(tmp_path / "last")
    for steps in (1, 2):
        run_ranks(1, train, run, start[1], steps=range(steps), save_to=place)
    run_ranks(1, train, run, None, steps=range(2, 2), load_from=place)  # its common state says step 2
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_what_cannot_be_read_or_written_is_one_line(start: Start, stopped: Path, tmp_path: Path) -> None:
    run = run_config(start[0], ParallelConfig())
    other = run_config(config_of(hf_model("qwen3")), ParallelConfig())
    (tmp_path / "mine").write_text("not a checkpoint")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in stopped.iterdir():
        whole = file.read_bytes()
        (broken / file.name).write_bytes(whole[: len(whole) // 2] if file.suffix == ".distcp" else whole)
    cases = [
        (run, "load_from", tmp_path / "nowhere", "nowhere: expected a Megatron checkpoint, found no metadata.json"),
        (run, "load_from", broken, r"__\d_0.distcp: (cut short|no whole torch.save archive)"),
        (
            other,
            "load_from",
            stopped,
            r"stopped: .*: (missing|expected shape \[.*\], found \[.*\]); .* of another (model|model or optimizer)",
        ),
        (run, "save_to", tmp_path / "mine", f"{tmp_path / 'mine'}: "),
    ]
    for config, way, place, message in cases:
        steps = range(0) if way == "save_to" else range(STOP, STOP)
        with pytest.raises(RankError, match=rf"CheckpointError: .*{message}.*\n$"):
            run_ranks(1, train, config, None, steps=steps, **{way: str(place)})
    assert (tmp_path / "mine").read_text() == "not a checkpoint"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "mine"]


@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_that_cannot_write_leaves_nothing(start: Start, tmp_path: Path, full: int) -> None:
    run = run_config(start[0], ParallelConfig(tp=2))
    with pytest.raises(RankError, match=r"CheckpointError: .*last: cannot write: .*\n$"):
        run_ranks(2, _save_on_a_full_disk, run, tmp_path / "last", full)
    assert list(tmp_path.iterdir()) == []


def _save_on_a_full_disk(run: RunConfig, place: Path, full: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        models = megatron.build(run, world, None)
        if world.rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        megatron.save(place, run, world, models, {})


def test_common_values_come_back_as_they_were(start: Start, tmp_path: Path) -> None:
    common = {"step": 7, "tokens": 12345678901234, "digest": "0af3", "best": 1.5, "seen": [1, 2]}
    run = run_config(start[0], ParallelConfig(tp=2))
    assert run_ranks(2, _round_trip, run, tmp_path / "c", common) == [common, common]
    assert pickle.loads((tmp_path / "c" / ".metadata").read_bytes()).state_dict_metadata.keys() >= {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "embedding.word_embeddings.weight",
    }


def _round_trip(run: RunConfig, place: Path, common: dict) -> dict:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        models = megatron.build(run, world, None)
        megatron.save(place, run, world, models, common)
        return megatron.load(place, run, world, models)
