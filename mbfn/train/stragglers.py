"""Which rank holds the others up. Steps take equally long on every rank, for they wait for each other; so what is
compared is what a rank does alone: waiting for its data, and a few matrix products of a fixed size.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from mbfn.megatron import World
from mbfn.train.loop import Observer
from mbfn.train.state import Metrics, TrainState

_SLOW = 1.5  # times the median
_MATTERS = 0.02  # of a step: less of it in loading data is let be
_SIZES = {"cpu": (192, torch.float32), "cuda": (4096, torch.bfloat16)}
_PRODUCTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Seconds of one rank, on average since the last comparison."""

    data_s: float  # a step, waiting for its batch
    products_s: float  # for the matrix products


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank that is slower than the others."""

    rank: int
    host: str
    what: Literal["data_s", "products_s"]
    seconds: float
    median: float

    def __str__(self) -> str:
        what = "waits for its data" if self.what == "data_s" else "takes for a few matrix products"
        return f"rank {self.rank} on {self.host} {what} {_ms(self.seconds)}, the median rank {_ms(self.median)}"


def find_stragglers(own: Sequence[Own], hosts: Sequence[str], step_s: float) -> list[Straggler]:
    """The ranks that stand out, of all ranks' figures in rank order; `step_s`: how long a step takes."""
    found: list[Straggler] = []
    whats: tuple[Literal["data_s", "products_s"], ...] = ("data_s", "products_s")
    for what in whats:
        values = [getattr(one, what) for one in own]
        median = statistics.median_low(values)
        least = max(_SLOW * median, median + _MATTERS * step_s if what == "data_s" else 0.0)
        found += [
            Straggler(rank=rank, host=hosts[rank], what=what, seconds=value, median=median)
            for rank, value in enumerate(values)
            if value > least
        ]
    return found


def comparing(world: World, interval: int, report: Callable[[int, list[Straggler], dict[str, Any]], None]) -> Observer:
    """An observer of every rank that compares them each `interval` steps; rank 0 reports. Collective."""
    hosts: list[str] = [""] * world.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    data: list[float] = []
    steps: list[float] = []

    def observe(_: TrainState, metrics: Metrics) -> None:
        data.append(metrics.data_s)
        steps.append(metrics.data_s + metrics.update_s)
        if metrics.step % interval:
            return
        mine = Own(data_s=statistics.fmean(data), products_s=products_s(world.device))
        own = _gathered(mine, world)
        if world.rank == 0:
            figures = {name: [float(f"{asdict(one)[name]:.3g}") for one in own] for name in ("data_s", "products_s")}
            report(metrics.step, find_stragglers(own, hosts, statistics.fmean(steps)), figures)
        data.clear()
        steps.clear()

    return observe


def products_s(device: torch.device) -> float:
    """Seconds that a few matrix products take here: the median of three tries."""
    size, dtype = _SIZES[device.type]
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    tries = []
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        for _ in range(_PRODUCTS):
            matrix @ matrix
        _wait(device)
        tries.append(time.perf_counter() - started)
    return statistics.median(tries)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gathered(mine: Own, world: World) -> list[Own]:
    sent = torch.tensor([mine.data_s, mine.products_s], dtype=torch.float64, device=world.device)
    found = [torch.empty_like(sent) for _ in range(world.world_size)]
    dist.all_gather(found, sent)
    return [Own(data_s=data, products_s=products) for data, products in (pair.tolist() for pair in found)]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
