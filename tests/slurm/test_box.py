"""The cluster of the tests is a real one."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.box import Box


def test_four_nodes_run_an_array_and_keep_exit_codes(box: Box, tmp_path: Path) -> None:
    assert sorted(box.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %C").split()[::2]) == ["n1", "n2", "n3", "n4"]
    box.run("sbatch", "-W", "--array=0-2", "-o", f"{tmp_path}/%a", "--wrap", "echo $SLURM_ARRAY_TASK_ID")
    assert [(tmp_path / str(task)).read_text().strip() for task in range(3)] == ["0", "1", "2"]
    hosts = box.run("srun", "-N2", "--ntasks-per-node=2", "printenv", "SLURM_PROCID", "SLURMD_NODENAME").split()
    assert sorted(hosts) == ["0", "1", "2", "3", "n1", "n1", "n2", "n2"]
