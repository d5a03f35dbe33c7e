"""Whether a run can start here, decided before anything is imported or allocated."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args, get_type_hints

from mbfn.config.model import Dtype
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import LaunchConfig
from mbfn.errors import LaunchError
from mbfn.launch.detect import Rank

_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOST_CPU_RANKS = 16  # processes that it makes sense to start on one machine without GPUs
Device = Literal["cpu", "cuda"]


def device_of(run: RunConfig, gpus: int) -> Device:
    """Where the ranks compute."""
    if run.launch.device == "auto":
        return "cuda" if gpus else "cpu"
    return run.launch.device


def check_launch(run: RunConfig, rank: Rank | None, gpus: int, memory: int | None = None) -> None:
    """Refuse a run that this machine, or the ranks that a launcher started, cannot hold.

    `memory`: bytes of this machine; none: ask the system.

    Raises: LaunchError, one line that names what can be done.
    """
    device = device_of(run, gpus)
    if run.peft.kind != "none" and run.init.hf is None and not run.bench:
        raise LaunchError("init.hf: adapters train beside weights that are trained already; give init.hf=DIR")
    _check_watching(run, device)
    if rank is None:
        _check_alone(run, device, gpus)
    else:
        _check_joined(run, rank, device, gpus)
    if device == "cpu":
        _check_cpu(run, rank, memory if memory is not None else _memory())


def _check_watching(run: RunConfig, device: Device) -> None:
    """Find the libraries of trackers, and what a profiler records, before anything starts."""
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
    for name in run.log.trackers:
        found = find_spec(name)
        if found is None or found.origin is None:  # without: a folder of that name, which the library itself leaves
            raise LaunchError(f"log.trackers: {name} is not installed; `pip install {packages[name]}`, or leave it out")
    if run.log.online and not os.environ.get("WANDB_API_KEY"):
        raise LaunchError("log.online: WANDB_API_KEY is not set; export it, or leave log.online=false")
    kind = run.profile.kind
    if device == "cpu" and kind in ("nsight", "memory"):
        raise LaunchError(f"profile.kind: {kind} records CUDA, this run is on CPU; profile=torch runs here")


def _check_alone(run: RunConfig, device: Device, gpus: int) -> None:
    needed = run.parallel.world_size
    fits = gpus >= needed if device == "cuda" else needed <= _MOST_CPU_RANKS and run.precision.fp8 == "none"
    if needed == 1 and fits:
        return
    if not fits:
        cluster = "launch=slurm, `srun` or `torchrun`" if "slurm" in launch_kinds() else "`srun` or `torchrun`"
        raise LaunchError(
            f"parallel: {_layout(run.parallel)} needs {needed} GPU{'s' * (needed > 1)}, this machine has {gpus}; "
            f"start it on a cluster with {cluster}, or look at it with `python -m mbfn.plan`"
        )
    if run.launch.kind == "auto":
        raise LaunchError(
            f"parallel: {_layout(run.parallel)} needs {needed} ranks, this is one process; add launch=local to start "
            f"them on this machine, or use `torchrun --nproc-per-node={needed} -m mbfn.train ...`"
        )


def _check_joined(run: RunConfig, rank: Rank, device: Device, gpus: int) -> None:
    needed, found = run.parallel.world_size, rank.world_size
    if found != needed:
        replicas, left = divmod(found * run.parallel.dp, needed)
        advice = (
            f"set parallel.dp={replicas}"
            if replicas and not left
            else f"start a multiple of {run.parallel.min_world_size}"
        )
        raise LaunchError(
            f"parallel: {_layout(run.parallel)} needs {needed} ranks, {rank.launcher} started {found}; {advice}"
        )
    if device == "cuda" and rank.local_world_size > gpus:
        raise LaunchError(
            f"launch.device: {rank.launcher} started {rank.local_world_size} ranks here, this machine has {gpus} GPUs; "
            "start one rank a GPU, or set launch.device=cpu"
        )


def _check_cpu(run: RunConfig, rank: Rank | None, memory: int) -> None:
    if run.precision.fp8 != "none":
        raise LaunchError(
            f"precision.fp8: {run.precision.fp8} needs GPUs with Transformer Engine, this run is on CPU; "
            "precision=fp32 and precision=bf16 run here"
        )
    share = 1.0 if rank is None else rank.local_world_size / rank.world_size
    needed = share * training_bytes(run)
    if needed > memory:
        raise LaunchError(
            f"model: weights, gradients and optimizer state take {needed / 2**30:.0f} GiB on CPU, this machine has "
            f"{memory / 2**30:.0f} GiB; choose a smaller model, or look at it with `python -m mbfn.plan`"
        )


def training_bytes(run: RunConfig) -> int:
    """Bytes of weights, gradients and optimizer state over all ranks, activations left out."""
    formats, replicas = run.precision, run.parallel.data_parallel_size
    main = 0 if formats.params == "fp32" else _BYTES[formats.main_params]
    state = main + _BYTES[formats.exp_avg] + _BYTES[formats.exp_avg_sq]
    copies = replicas if run.parallel.sharding == "none" else 1
    return run.model.num_parameters * ((_BYTES[formats.params] + _BYTES[formats.grads]) * replicas + state * copies)


def launch_kinds() -> tuple[str, ...]:
    """The ways of starting ranks that this version has."""
    return get_args(get_type_hints(LaunchConfig)["kind"])


def _layout(parallel: ParallelConfig) -> str:
    shown = [f"{name}={getattr(parallel, name)}" for name in ("cp", "ep") if getattr(parallel, name) > 1]
    return " ".join([f"tp={parallel.tp}", f"pp={parallel.pp}", *shown, f"dp={parallel.dp}"])


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
