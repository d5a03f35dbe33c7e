"""`hydra/launcher=mbfn_slurm`: the jobs of a multirun as job arrays of a Slurm cluster.

Hydra looks for launchers in `hydra_plugins` alone. Everything is composed and checked here, before anything is
submitted; the jobs read the frozen result. Nodes, limits and the cluster are those of the groups `launch` and `site`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from mbfn.train.job import Job


# A plain tree: Hydra executes this file without entering it in sys.modules, where a dataclass looks for itself.
FIELDS = {
    "_target_": "hydra_plugins.mbfn_launcher.MbfnSlurmLauncher",
    "array_parallelism": 256,  # runs of one array that the cluster may start at a time
}
ConfigStore.instance().store(group="hydra/launcher", name="mbfn_slurm", node=FIELDS, provider="mbfn")


class MbfnSlurmLauncher(Launcher):
    """Hydra's side of `mbfn.launch.slurm_sweep.run_sweep`."""

    def __init__(self, array_parallelism: int) -> None:
        self._parallel_runs = array_parallelism

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composes the jobs."""
        self._loader, self._config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs; ends the process with one line for each that failed."""
        from hydra.core.utils import JobReturn, JobStatus

        from mbfn.config.command import end_with
        from mbfn.errors import MbfnError
        from mbfn.launch.slurm_sweep import run_sweep

        sweep_dir = Path(str(self._config.hydra.sweep.dir))
        try:
            jobs = [self._job(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
            results = run_sweep(jobs, sweep_dir=sweep_dir, parallel_runs=self._parallel_runs)
        except MbfnError as error:
            end_with(error)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=result) for result in results]

    def _job(self, overrides: list[str], number: int) -> Job:
        from hydra.core.utils import filter_overrides
        from omegaconf import OmegaConf, open_dict

        from mbfn.config.build import build
        from mbfn.config.run import RunConfig
        from mbfn.train.job import Job

        composed = self._loader.load_sweep_config(self._config, overrides)
        with open_dict(composed):
            composed.hydra.job.num = number
            composed.hydra.job.id = str(number)
        output_dir = Path(str(composed.hydra.sweep.dir)) / str(composed.hydra.sweep.subdir)
        tree: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, _task_keys(composed)), resolve=True)
        command = ("python", "-m", "mbfn.train", *filter_overrides(overrides))
        return Job(run=build(RunConfig, tree), output_dir=output_dir, command=command)


def _task_keys(composed: DictConfig) -> list[str]:
    return [str(key) for key in composed if key != "hydra"]
