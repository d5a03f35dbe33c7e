"""The figures of a benchmark as one JSON line and as a table."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mbfn.megatron import World
from mbfn.megatron.resolved import Choice
from mbfn.plan.flops import run_flops, step_tokens
from mbfn.train.job import Job
from mbfn.train.provenance import git_revision, versions
from mbfn.train.timesplit import TimeSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured on one rank."""

    steps_ms: tuple[float, ...]
    loop_ms: float  # a step's share of the loop, the step included
    losses: tuple[float, ...]
    ceilings: dict[str, float]  # TFLOP/s of matrix products alone, by format
    peaks_gib: dict[str, float]
    split: TimeSplit | None
    startup: dict[str, float]  # seconds since the process started
    choices: tuple[Choice, ...]  # what the run became on its device


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A benchmark's record: plain values."""

    record: dict[str, Any]

    @property
    def line(self) -> str:
        """The record as a line of JSON."""
        return json.dumps(self.record) + "\n"


def report(job: Job, world: World, figures: Figures) -> Report:
    """Everything that a comparison of two benchmarks needs."""
    run = job.run
    split = figures.split
    record = {
        "side": "mbfn",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_revision(),
        "versions": versions(),
        "device": _device_name(world.device),
        "digest": run.digest,
        "overrides": [text for text in job.command if "=" in text],
        "world_size": world.world_size,
        "choices": {choice.name: choice.value for choice in figures.choices},
        **_speed(job, world, figures),
        "times_ms": [round(ms, 1) for ms in figures.steps_ms],
        "losses": [figures.losses[0], figures.losses[-1]],
        "peak_gib": round(figures.peaks_gib["allocated"], 1),
        "reserved_gib": round(figures.peaks_gib["reserved"], 1),
        "startup_s": {name: round(seconds, 1) for name, seconds in figures.startup.items()},
        "split_ms": {kind: round(ms, 2) for kind, ms in split.kinds.items()} if split else {},
        "profiled_ms": round(split.wall, 1) if split else None,
        "kernels": [[name[:120], round(ms, 2), calls] for name, ms, calls in split.top] if split else [],
    }
    return Report(record=record)


def _speed(job: Job, world: World, figures: Figures) -> dict[str, Any]:
    run, step = job.run, statistics.median(figures.steps_ms)
    flops = run_flops(run)
    rate = step_tokens(run) / step * 1000
    causal, full = (rate * each / world.world_size / 1e12 for each in (flops.causal, flops.full))
    return {
        "step_ms": round(step, 2),
        "tokens_per_s": round(rate, 1),
        "tflops_causal": round(causal, 3),
        "tflops_full": round(full, 3),
        "ceilings": {name: round(value, 3) for name, value in figures.ceilings.items()},
        "utilisation": {name: round(causal / value, 4) for name, value in figures.ceilings.items()},
        "loop_overhead": round((figures.loop_ms - statistics.mean(figures.steps_ms)) / figures.loop_ms, 5),
    }


def show(console: Console, made: Report, path: Path) -> None:
    """Print the record as a table."""
    record = made.record
    table = Table("figure", "value", title=f"{record['device']}, {record['world_size']} rank(s)", title_justify="left")
    spread = f"{min(record['times_ms']):,.1f} to {max(record['times_ms']):,.1f}"
    table.add_row("step", f"{record['step_ms']:,.1f} ms (median; {spread})")
    table.add_row("tokens a second", f"{record['tokens_per_s']:,.0f}")
    table.add_row("model TFLOP/s a rank", f"{record['tflops_causal']:,.2f} causal, {record['tflops_full']:,.2f} full")
    for name, share in record["utilisation"].items():
        table.add_row(f"of {name} products alone", f"{share:.1%} of {record['ceilings'][name]:,.1f} TFLOP/s")
    table.add_row("peak memory", f"{record['peak_gib']:.1f} GiB, reserved {record['reserved_gib']:.1f} GiB")
    table.add_row("outside the steps", f"{record['loop_overhead']:.2%} of the loop")
    table.add_row("start to first step", f"{record['startup_s']['first_step']:.1f} s")
    for kind, spent in record["split_ms"].items():
        table.add_row(f"  {kind}", f"{spent:,.1f} ms  {spent / record['profiled_ms']:.1%}")
    console.print(table)
    console.print(f"results: {path}", highlight=False, soft_wrap=True)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
