"""Tell what a run became on its device: one line to read, and every reason in a file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from mbfn.config.run import RunConfig
from mbfn.megatron import Models, World
from mbfn.megatron.resolved import Choice, choices, opening
from mbfn.train.provenance import write_text

RESOLVED = "resolved.json"


def tell_choices(
    run: RunConfig, world: World, models: Models, output_dir: Path, console: Console
) -> tuple[Choice, ...]:
    """Leave the choices with their reasons in the output directory; print them where there was something to choose."""
    found = choices(run, world, models)
    if world.rank == 0:
        written = {choice.name: {"value": choice.value, "reason": choice.reason} for choice in found}
        write_text(output_dir / RESOLVED, json.dumps(written, indent=2) + "\n")
    if run.bench or world.device.type == "cuda":
        console.print(opening(found), highlight=False, soft_wrap=True)
    return found
