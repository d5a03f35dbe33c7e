"""A run that cannot start here is refused in one line, before anything is imported or allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import LaunchConfig, TrainConfig
from mbfn.errors import LaunchError
from mbfn.launch.check import check_launch, launch_kinds, training_bytes
from mbfn.launch.detect import Rank
from tests.data.runs import make_run

GIB = 2**30
FP8 = PrecisionConfig(params="bf16", fp8="delayed")


def llama_70b(precision: PrecisionConfig = FP8, kind: str = "auto", **parallel: int) -> RunConfig:
    model = ModelConfig(
        family="llama",
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    return RunConfig(
        model=model,
        parallel=ParallelConfig(**parallel),
        precision=precision,
        launch=LaunchConfig(kind=kind),  # type: ignore[arg-type]
        train=TrainConfig(global_batch_size=64, micro_batch_size=1),
    )


def tiny(kind: str = "auto", device: str = "auto", **parallel: int) -> RunConfig:
    base = make_run(Path("unused"), global_batch_size=48)
    launch = LaunchConfig(kind=kind, device=device)  # type: ignore[arg-type]
    return RunConfig(model=base.model, parallel=ParallelConfig(**parallel), train=base.train, launch=launch)


def torchrun(world_size: int, local: int | None = None) -> Rank:
    return Rank(rank=0, world_size=world_size, local_rank=0, local_world_size=local or world_size, launcher="torchrun")


def refusal(run: RunConfig, rank: Rank | None = None, gpus: int = 0, memory: int = 64 * GIB) -> str:
    with pytest.raises(LaunchError) as error:
        check_launch(run, rank, gpus, memory)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kind", ["auto", "local"])
def test_more_gpus_than_here(kind: str) -> None:
    slurm = "launch=slurm, " if "slurm" in launch_kinds() else ""
    assert refusal(llama_70b(kind=kind, tp=8, pp=4)) == (
        "parallel: tp=8 pp=4 dp=1 needs 32 GPUs, this machine has 0; start it on a cluster with "
        f"{slurm}`srun` or `torchrun`, or look at it with `python -m mbfn.plan`"
    )
    assert "needs 32 GPUs, this machine has 8;" in refusal(llama_70b(kind=kind, tp=8, pp=4), gpus=8)


def test_several_ranks_need_a_launcher() -> None:
    assert refusal(tiny(tp=2, pp=2)) == (
        "parallel: tp=2 pp=2 dp=1 needs 4 ranks, this is one process; add launch=local to start them on this machine, "
        "or use `torchrun --nproc-per-node=4 -m mbfn.train ...`"
    )
    check_launch(tiny(kind="local", tp=2, pp=2), None, 0, GIB)
    check_launch(tiny(tp=2, pp=2), torchrun(4), 0, GIB)
    check_launch(tiny(), None, 0, GIB)


def test_torchrun_with_another_number_of_ranks() -> None:
    assert refusal(tiny(tp=2), torchrun(4)) == (
        "parallel: tp=2 pp=1 dp=1 needs 2 ranks, torchrun started 4; set parallel.dp=2"
    )
    assert refusal(tiny(tp=2, dp=2), torchrun(6)) == (
        "parallel: tp=2 pp=1 dp=2 needs 4 ranks, torchrun started 6; set parallel.dp=3"
    )
    assert refusal(tiny(tp=2), torchrun(3)) == (
        "parallel: tp=2 pp=1 dp=1 needs 2 ranks, torchrun started 3; start a multiple of 2"
    )
    assert refusal(tiny(tp=2, dp=2), torchrun(1)) == (
        "parallel: tp=2 pp=1 dp=2 needs 4 ranks, torchrun started 1; start a multiple of 2"
    )


def test_gpus_are_asked_for_where_there_are_none() -> None:
    assert "needs 1 GPU, this machine has 0;" in refusal(tiny(device="cuda"))
    assert "torchrun started 4 ranks here, this machine has 2 GPUs" in refusal(tiny(tp=4), torchrun(4), gpus=2)
    check_launch(tiny(tp=4), torchrun(8 // 2), gpus=4)


def test_what_a_cpu_cannot_hold() -> None:
    assert refusal(llama_70b(tp=8, pp=4), torchrun(32, local=4)) == (
        "precision.fp8: delayed needs GPUs with Transformer Engine, this run is on CPU; precision=fp32 and "
        "precision=bf16 run here"
    )
    assert refusal(llama_70b(PrecisionConfig())) == (
        "model: weights, gradients and optimizer state take 1051 GiB on CPU, this machine has 64 GiB; choose a smaller "
        "model, or look at it with `python -m mbfn.plan`"
    )
    assert "take 263 GiB" in refusal(llama_70b(PrecisionConfig(), tp=8), torchrun(8, local=2))


@pytest.mark.parametrize(
    ("precision", "dp", "per_parameter"),
    [({}, 1, 16), ({"params": "bf16"}, 1, 18), ({"params": "bf16", "grads": "bf16"}, 2, 2 * 4 + 12)],
)
def test_bytes_of_training(precision: dict[str, Any], dp: int, per_parameter: int) -> None:
    run = llama_70b(PrecisionConfig(**precision), dp=dp)
    assert training_bytes(run) == run.model.num_parameters * per_parameter
