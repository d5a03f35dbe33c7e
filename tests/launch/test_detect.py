"""Who started this process is read from the environment alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mbfn.launch.detect import Rank, detect, local_gpus, rank_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
STEP = {
    "SLURM_JOB_ID": "70",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_torchrun() -> None:
    expected = Rank(rank=3, world_size=8, local_rank=1, local_world_size=4, launcher="torchrun")
    assert detect(TORCHRUN) == expected
    assert detect(STEP | TORCHRUN) == expected
    assert rank_environment(expected, TORCHRUN) == {}


def test_srun() -> None:
    rank = detect(STEP)
    assert rank == Rank(rank=3, world_size=4, local_rank=1, local_world_size=2, launcher="srun")
    env = rank_environment(rank, STEP | {"MASTER_ADDR": "n1"})
    assert env == {
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(20000 + 70 * 37),
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    requeued = rank_environment(rank, STEP | {"MASTER_ADDR": "n1", "SLURM_RESTART_COUNT": "1"})
    assert requeued["MASTER_PORT"] != env["MASTER_PORT"]


@pytest.mark.parametrize(
    "env",
    [{}, BATCH_SCRIPT, BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}],
    ids=["plain", "batch script", "batch step", "half an environment"],
)
def test_not_a_rank(env: dict[str, str]) -> None:
    assert detect(env) is None


def test_gpus_are_counted_without_torch(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert local_gpus({}, tmp_path) == 3
    assert local_gpus({"CUDA_VISIBLE_DEVICES": "1,10"}, tmp_path) == 2
    assert local_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert local_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0


def test_a_run_is_checked_before_torch_is_imported() -> None:
    program = (
        "import sys, mbfn.launch.start, mbfn.train.__main__\n"
        "print([name for name in ('torch', 'jax', 'megatron', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
