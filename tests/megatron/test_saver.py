"""Saving beside the steps: what is written is the state of its moment, shared out, and read by plain Megatron."""

from __future__ import annotations

import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mbfn.megatron as megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.storage import file_jobs, open_torch_dist, read_manifest
from tests.megatron.tiny import config_of, hf_model, micro_batches, run_config, train, weights_of
from tests.ranks import RankError, run_ranks

LAYOUTS = {"dp2": ParallelConfig(dp=2), "tp2pp2": ParallelConfig(tp=2, pp=2, dp=1)}
Start = tuple[ModelConfig, dict[str, Tensor]]


@pytest.fixture(scope="module")
def start() -> Start:
    return config_of(hf_model("tied")), weights_of(hf_model("tied"))


def _save_beside_steps(run: RunConfig, weights: Mapping[str, Tensor], root: Path) -> list[str]:
    """Updates 0 to 4; saved after the second, both beside the others and with training stopped."""
    from mbfn.convert import to_megatron

    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank)
        models, saver = megatron.build(run, world, own), megatron.Saver(world)
        for step in range(5):
            megatron.train_step(run, world, models, micro_batches(step, run, world.coordinates.dp), lr=run.optim.lr)
            if step == 1:
                megatron.save(root / "stopped", run, world, models, {"step": 2})
                common = {"step": 2}
                megatron.begin_save(saver, root / "beside", run, world, models, common, record={"note": "here"})
        assert saver.finish() == ""
        return sorted(path.name for path in (root / "beside").glob("*.distcp"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_beside_steps_is_of_its_moment(start: Start, tmp_path: Path, layout: str) -> None:
    run = run_config(start[0], LAYOUTS[layout])
    size = run.parallel.world_size
    names, *_ = run_ranks(size, _save_beside_steps, run, start[1], tmp_path)
    assert names == [f"__{rank}_0.distcp" for rank in range(size)]
    with open_torch_dist(tmp_path / "stopped") as expected, open_torch_dist(tmp_path / "beside") as found:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert found.common() == expected.common()
    sizes = [(tmp_path / "beside" / name).stat().st_size for name in names]
    assert max(sizes) < 1.6 * min(sizes)
    manifest = read_manifest(tmp_path / "beside")
    assert manifest["note"] == "here"
    assert [job() for job in file_jobs(tmp_path / "beside")] == [""] * (size + 3)


def test_a_flipped_bit_anywhere_is_named(start: Start, tmp_path: Path) -> None:
    run = run_config(start[0], ParallelConfig())
    run_ranks(1, train, run, start[1], steps=range(1), save_to=str(tmp_path / "c"))
    draw = torch.Generator().manual_seed(0)
    for name in read_manifest(tmp_path / "c")["crc32"]:
        file = tmp_path / "c" / name
        whole = file.read_bytes()
        for _ in range(3):
            place, bit = (int(torch.randint(high, (), generator=draw)) for high in (len(whole), 8))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            faults = [fault for job in file_jobs(tmp_path / "c") if (fault := job())]
            assert faults == [f"{file}: bytes changed since it was written; copy it again"]
        file.write_bytes(whole)
    manifest = tmp_path / "c" / "mbfn.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"hidden_size": 48', '"hidden_size": 49'))
    said = [job() for job in file_jobs(tmp_path / "c")]
    assert [fault for fault in said if fault] == [f"{manifest}: changed since it was written; copy it again"]
    manifest.write_text(text)
    assert not any(job() for job in file_jobs(tmp_path / "c"))


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_fills_up_beside_steps(start: Start, tmp_path: Path, full: int) -> None:
    """Every rank learns why, the checkpoint before stays, and the next save is a whole one."""
    run = run_config(start[0], ParallelConfig(dp=2))
    said = run_ranks(2, _fill_up, run, tmp_path, full)
    place = tmp_path / "second"
    assert (
        said
        == [f"{place}: cannot write: rank {full}: the disk is full or its quota reached; nothing was left there"] * 2
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "third"]
    assert not any(job() for name in ("first", "third") for job in file_jobs(tmp_path / name))


def _fill_up(run: RunConfig, root: Path, full: int) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        models, saver = megatron.build(run, world, None), megatron.Saver(world)
        said = ""
        for name in ("first", "second", "third"):
            limit = 50_000 if name == "second" and world.rank == full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            megatron.begin_save(saver, root / name, run, world, models, {})
            said = saver.finish() or said
        return said


def test_a_rank_that_dies_beside_a_save_leaves_the_one_before(start: Start, tmp_path: Path) -> None:
    run = run_config(start[0], ParallelConfig(dp=2))
    with pytest.raises(RankError):
        run_ranks(2, _die, run, tmp_path, timeout_s=20)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["first"]
    assert not any(job() for job in file_jobs(tmp_path / "first"))


def _die(run: RunConfig, root: Path) -> None:
    import os

    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        models, saver = megatron.build(run, world, None), megatron.Saver(world)
        megatron.save(root / "first", run, world, models, {})
        if world.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        megatron.begin_save(saver, root / "second", run, world, models, {})
        saver.finish()


def _plain_metadata(world: megatron.World) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": world.groups.dp_cp,
    }


def _load_plainly(run: RunConfig, place: Path) -> dict[str, Tensor]:
    """The weights and optimizer as plain Megatron-core reads them, at `run`'s layout."""
    from megatron.core import dist_checkpointing

    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        models = megatron.build(run, world, None)
        metadata = _plain_metadata(world)
        state: dict[str, Any] = {"model": models.chunks[0].sharded_state_dict(metadata=metadata)}
        state["optimizer"] = models.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
        found = dist_checkpointing.load(state, str(place))
        models.chunks[0].load_state_dict(found["model"])
        moments = {
            f"{number}.{key}": value.detach().clone()
            for number, states in found["optimizer"]["param_state"].items()
            for key, value in states.items()
        }
        weights = {name: value.detach().clone() for name, value in megatron.state_dict(models).items()}
        return weights | moments


def test_plain_megatron_reads_it_at_another_layout(start: Start, tmp_path: Path) -> None:
    """Written by four ranks, each its stretches of the optimizer; read whole by one with Megatron's own code."""
    run = run_config(start[0], ParallelConfig(tp=2, dp=2))
    run_ranks(4, train, run, start[1], steps=range(2), save_to=str(tmp_path / "c"))
    alone = run_config(start[0], ParallelConfig())
    ((_, expected),) = run_ranks(1, train, alone, None, steps=range(2, 2), load_from=str(tmp_path / "c"))
    ((found),) = run_ranks(1, _load_plainly, alone, tmp_path / "c")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with open_torch_dist(tmp_path / "c") as source:
        stored = [source[key] for key in source if key.startswith("optimizer.state.exp_avg_sq.")]
    read = [value for name, value in found.items() if name.endswith(".exp_avg_sq")]
    assert sum(float(value.double().sum()) for value in read) == pytest.approx(
        sum(float(value.double().sum()) for value in stored), rel=1e-9
    )


def _save_plainly(run: RunConfig, weights: Mapping[str, Tensor], place: Path) -> list[megatron.StepResult]:
    """Two updates, saved by plain Megatron-core, and two more."""
    import queue

    import megatron.core.dist_checkpointing.strategies.filesystem_async as core_writer
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from mbfn.convert import to_megatron

    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank)
        models = megatron.build(run, world, own)
        results = []
        for step in range(4):
            batch = micro_batches(step, run, world.coordinates.dp)
            results.append(megatron.train_step(run, world, models, batch, lr=run.optim.lr))
            if step == 1:
                metadata = _plain_metadata(world)
                state: dict[str, Any] = {"model": models.chunks[0].sharded_state_dict(metadata=metadata)}
                state["optimizer"] = models.optimizer.sharded_state_dict(state, metadata=metadata)
                state["iteration"] = 2
                core_writer._results_queue = queue.Queue()  # else Megatron starts a process for it
                place.mkdir(exist_ok=True)
                dist_checkpointing.save(state, str(place), TorchDistSaveShardedStrategy())
        return results


def _resume(run: RunConfig, place: Path) -> tuple[dict[str, Any], list[megatron.StepResult]]:
    with megatron.open_world(run.parallel, device="cpu", timeout_s=60) as world:
        models = megatron.build(run, world, None)
        record = megatron.load(place, run, world, models)
        batches = [micro_batches(step, run, world.coordinates.dp) for step in (2, 3)]
        return record, [megatron.train_step(run, world, models, batch, lr=run.optim.lr) for batch in batches]


def test_a_checkpoint_of_plain_megatron_resumes(start: Start, tmp_path: Path) -> None:
    run = run_config(start[0], ParallelConfig(tp=2))
    whole, _ = run_ranks(2, _save_plainly, run, start[1], tmp_path / "plain")
    (record, same), _ = run_ranks(2, _resume, run, tmp_path / "plain")
    assert record == {"iteration": 2}
    assert same == whole[2:]
    (_, other), _ = run_ranks(2, _resume, run_config(start[0], ParallelConfig(dp=2)), tmp_path / "plain")
    assert [result.loss for result in other] == pytest.approx([result.loss for result in whole[2:]], abs=5e-6)
