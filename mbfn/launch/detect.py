"""What launched this process, and what this machine has, without importing torch."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mbfn.errors import LaunchError

_SLURM_SPECIAL_STEPS = 4294967290  # batch, extern and interactive steps have ids from here on


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """The place of this process among those that a launcher started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Literal["torchrun", "srun"]


def detect(env: Mapping[str, str]) -> Rank | None:
    """The rank that a launcher gave this process; none when nothing has launched it.

    torchrun first, because `srun torchrun` sets both. An interactive allocation and a batch script's own process carry
    Slurm's job variables without being a task, so a task needs a proper step id.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        world = int(env["WORLD_SIZE"])
        return Rank(
            rank=int(env["RANK"]),
            world_size=world,
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            launcher="torchrun",
        )
    step = env.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env and step and int(step) < _SLURM_SPECIAL_STEPS:
        world = int(env["SLURM_STEP_NUM_TASKS"])
        return Rank(
            rank=int(env["SLURM_PROCID"]),
            world_size=world,
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=max(1, world // int(env.get("SLURM_STEP_NUM_NODES", "1"))),
            launcher="srun",
        )
    return None


def rank_environment(rank: Rank, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch's `env://` start-up reads, beyond those that are set already."""
    if rank.launcher == "torchrun":
        return {}
    # The restart count keeps a requeued job off the port that its predecessor has just left.
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 37 + int(env.get("SLURM_RESTART_COUNT", "0"))) % 12000
    return {
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
        "RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_RANK": str(rank.local_rank),
        "LOCAL_WORLD_SIZE": str(rank.local_world_size),
    }


def local_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use."""
    present = sum(1 for entry in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", entry.name))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _first_host(nodes: str) -> str:
    host = _output("scontrol", "show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        address = re.search(r"NodeAddr=(\S+)", _output("scontrol", "-o", "show", "node", host))
        if address is None:
            raise LaunchError(
                f"srun: node {host} does not resolve and Slurm has no address for it; set MASTER_ADDR"
            ) from None
        return address[1]
    return host


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"srun: `{' '.join(command)}` failed ({error}); set MASTER_ADDR to the first node") from error
