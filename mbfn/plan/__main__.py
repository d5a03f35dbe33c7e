"""`python -m mbfn.plan`: what a run needs and takes, computed from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbfn.config.compose import RunContext, hydra_main
from mbfn.config.recipes import resolved_precision
from mbfn.config.run import RunConfig
from mbfn.errors import ConfigError
from mbfn.plan.devices import DEVICES, Device
from mbfn.plan.flops import step_tokens
from mbfn.plan.options import PlanConfig
from mbfn.plan.search import Candidate, search

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 140  # columns of a file or pipe


def plan(config: PlanConfig, context: RunContext) -> None:
    """Print the plan, draw it, and fail with the reason where it does not fit."""
    del context
    run, device = config.to_run(), DEVICES[config.device]
    run = replace(run, precision=resolved_precision(run.precision, device.capability, device.label)[0])
    if config.search:
        _search(config, run, device)
    else:
        _plan(config, run, device)


def _plan(config: PlanConfig, run: RunConfig, device: Device) -> None:
    from mbfn.plan.report import plan_text, plan_values, verdict

    tokens = config.tokens or step_tokens(run) * run.train.steps
    if config.format == "json":
        print(json.dumps(plan_values(run, device, tokens), indent=2))
    else:
        _print(plan_text(run, device, tokens))
    if config.out:
        from mbfn.plan.pictures import draw_memory, draw_pipeline

        directory = Path(config.out).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        draw_memory(run, device, directory / "memory.png")
        draw_pipeline(run, device, directory / "pipeline.png")
    if reason := verdict(run, device):
        raise ConfigError([("parallel", f"does not fit: {reason}; {_advice(run, device)}")])


def _advice(run: RunConfig, device: Device) -> str:
    """The fastest layout that fits, on as few times the GPUs as needed."""
    from mbfn.plan.report import layout_overrides

    for times in (1, 2, 4, 8, 16, 32):
        gpus = run.parallel.world_size * times
        if found := search(run, device, gpus):
            return f"{gpus} GPUs hold it with {' '.join(layout_overrides(found[0].run))}"
    return "no layout tried holds it; lower train.micro_batch_size or train.seq_length"


def _search(config: PlanConfig, run: RunConfig, device: Device) -> None:
    from mbfn.plan.report import search_text

    gpus = config.gpus or run.parallel.world_size
    found = search(run, device, gpus)
    if not found:
        raise ConfigError([("gpus", f"no layout of this model and batch on {gpus} x {device.label} fits; give more")])
    if config.format == "json":
        print(json.dumps([_row(candidate) for candidate in found[: config.top]], indent=2))
    else:
        _print(search_text(found, config.top))


def _row(candidate: Candidate) -> dict[str, object]:
    from mbfn.plan.report import layout_overrides

    return {
        "overrides": list(layout_overrides(candidate.run)),
        "peak": candidate.peak,
        "step": candidate.speed.step,
        "tokens_per_second": candidate.speed.tokens_per_second,
    }


def _print(content: RenderableType) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, _WIDTH))
    console.print(content)


if __name__ == "__main__":
    from mbfn.families import model_from_hf

    hydra_main(plan, root=PlanConfig, config_name="plan", model_from_hf=model_from_hf, outputs=False)
