"""A batch script as a function of the runs that it starts. Nothing here acts: what is printed is what is submitted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbfn.config.run import RunConfig
from mbfn.config.site import SiteConfig
from mbfn.errors import LaunchError
from mbfn.train.stop import REQUEUE

SAVED = "saved"  # the file of an attempt's directory that says: state saved, start again


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """What a run needs of a cluster."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One run of a script: where its results go, and the frozen job that its ranks read."""

    output_dir: Path
    job_file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All that a script is made of. `run` gives nodes, limits and site; with `parallel_runs` > 0 it is a job array."""

    run: RunConfig
    entries: tuple[Entry, ...]
    log: Path  # with Slurm's % patterns
    cwd: Path
    python: str
    parallel_runs: int = 0


def nodes_of(run: RunConfig) -> Nodes:
    """Nodes and ranks a node: as many ranks on a node as it has GPUs, fewer only where one node is enough.

    Raises: LaunchError where the ranks leave the last node partly empty, or the nodes cannot compute this.
    """
    gpus = 0 if run.launch.device == "cpu" else run.site.gpus_per_node
    if not gpus and (run.launch.device == "cuda" or run.precision.fp8 != "none"):
        wanted = "launch.device=cuda" if run.launch.device == "cuda" else f"precision.fp8={run.precision.fp8}"
        raise LaunchError(
            f"site.gpus_per_node: {wanted} needs GPUs, this run gets none; set it, or choose another site"
        )
    ranks, most = run.parallel.world_size, gpus or run.site.cpu_ranks_per_node
    per_node = min(ranks, most)
    if ranks % per_node:
        field = "gpus_per_node" if gpus else "cpu_ranks_per_node"
        fitting = max(size for size in range(1, most + 1) if ranks % size == 0)
        raise LaunchError(
            f"parallel: {ranks} ranks do not fill nodes of {most}; use a multiple of {most} (parallel.dp), or "
            f"site.{field}={fitting}"
        )
    return Nodes(nodes=ranks // per_node, ranks_per_node=per_node, gpus_per_node=per_node if gpus else 0)


def batch_script(batch: Batch) -> str:
    """The script that sbatch gets.

    Raises: LaunchError as `nodes_of` does, and where a container would not see the results.
    """
    _check_mounts(batch)
    site = batch.run.site
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in _options(batch)),
            "",
            *_places(batch.entries),
            *_rendezvous(),
            *(f"export {shlex.quote(text)}" for text in site.environment),
            *_setup(site),
            shlex.join(["srun", *_srun_options(batch)])
            + f' {shlex.quote(batch.python)} -u -m mbfn.launch.slurm_task "$job" "$attempt"',
            "code=$?",
            *site.teardown,
            *_requeue(batch.run),
            "exit $code",
            "",
        ]
    )


def _options(batch: Batch) -> Iterator[str]:
    run, site, launch, nodes = batch.run, batch.run.site, batch.run.launch, nodes_of(batch.run)
    yield f"--job-name={shlex.quote(launch.job_name)}"
    yield f"--nodes={nodes.nodes}"
    yield f"--ntasks-per-node={nodes.ranks_per_node}"
    if nodes.gpus_per_node and site.gres:
        yield f"--gres={site.gres}:{nodes.gpus_per_node}"
    if site.cpus_per_rank:
        yield f"--cpus-per-task={site.cpus_per_rank}"
    if site.mem_gb:
        yield f"--mem={site.mem_gb}G"
    yield f"--time={launch.time_min}"
    yield f"--signal=USR1@{launch.signal_s}"
    yield "--requeue" if run.launch.max_requeues else "--no-requeue"
    yield "--open-mode=append"
    yield f"--chdir={shlex.quote(str(batch.cwd))}"
    yield f"--output={shlex.quote(str(batch.log))}"
    if batch.parallel_runs:
        yield f"--array=0-{len(batch.entries) - 1}%{batch.parallel_runs}"
    for name in ("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude"):
        if value := getattr(site, name):
            yield f"--{name}={shlex.quote(value)}"
    if site.exclusive:
        yield "--exclusive"
    if launch.dependency:
        yield f"--dependency={shlex.quote(launch.dependency)}"
    yield from site.sbatch_args


def _places(entries: Sequence[Entry]) -> list[str]:
    if len(entries) == 1:
        first = [f"run={shlex.quote(str(entries[0].output_dir))}", f"job={shlex.quote(str(entries[0].job_file))}"]
    else:
        first = [
            f"runs=({' '.join(shlex.quote(str(entry.output_dir)) for entry in entries)})",
            f"jobs=({' '.join(shlex.quote(str(entry.job_file)) for entry in entries)})",
            "run=${runs[$SLURM_ARRAY_TASK_ID]}",
            "job=${jobs[$SLURM_ARRAY_TASK_ID]}",
        ]
    return [*first, 'attempt="$run/slurm/${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}"', 'mkdir -p "$attempt"']


def _rendezvous() -> list[str]:
    """The first node by the address that Slurm itself reaches it with: its name need not resolve, and a container has
    no scontrol to ask.
    """
    return [
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        r"""export MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')""",
    ]


def _setup(site: SiteConfig) -> list[str]:
    if not site.setup:
        return []
    failed = """trap 'echo "error: site.setup: $BASH_COMMAND failed" >&2; exit 1' ERR"""
    return [failed, *site.setup, "trap - ERR"]


def _srun_options(batch: Batch) -> list[str]:
    site = batch.run.site
    options = ["--kill-on-bad-exit=1"]
    if site.cpus_per_rank:
        options.append(f"--cpus-per-task={site.cpus_per_rank}")  # srun does not take it over from sbatch
    if site.container_image:
        options.append(f"--container-image={site.container_image}")
        options += [f"--container-mounts={','.join(site.container_mounts)}"] if site.container_mounts else []
        options.append(f"--container-workdir={batch.cwd}")
    return [*options, *site.srun_args]


def _requeue(run: RunConfig) -> list[str]:
    """After a saved stop: back into the queue, unless the job was cancelled or has been there often enough."""
    count = run.launch.max_requeues
    running = '[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]'
    again = f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {count} ] && {running}; then'
    requeue = '    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # Slurm ends this script'
    return [
        f'if [ $code -eq 0 ] && [ -e "$attempt/{SAVED}" ]; then',
        *([again, requeue, "  fi"] if count else []),
        f"  code={REQUEUE}",
        "fi",
    ]


def _check_mounts(batch: Batch) -> None:
    site = batch.run.site
    if not site.container_image:
        return
    same = [Path(parts[0]) for mount in site.container_mounts if (parts := mount.split(":"))[0] == parts[1]]
    for place in (batch.cwd, *(entry.output_dir for entry in batch.entries)):
        if not any(place.is_relative_to(mount) for mount in same):
            raise LaunchError(
                f"site.container_mounts: {place} is not mounted at the same path in {site.container_image}; "
                f"add {place}:{place}"
            )
