"""`python -m mbfn.sweep DIR`: the runs of a sweep, best first, as a table and a picture."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from mbfn.config.command import RunContext, hydra_main
from mbfn.launch.table import aligned, draw_sweep, table
from mbfn.status import runs_under


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Which runs to compare."""

    dir: str = "multirun"
    out: str | None = None  # where sweep.csv and sweep.png go; none: to `dir`


def sweep(config: SweepConfig, context: RunContext) -> None:
    """Print the runs in the order of their results; write sweep.csv and sweep.png."""
    del context
    root, found = runs_under(config.dir)
    runs = sorted(found, key=lambda run: (run.rank_by, run.path))
    rows = table(runs, root)
    out = Path(config.out).expanduser() if config.out else root
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    draw_sweep(runs, out / "sweep.png")
    sys.stdout.write(aligned(rows))
    print(f"written: {out / 'sweep.csv'}, {out / 'sweep.png'}")


if __name__ == "__main__":
    hydra_main(sweep, root=SweepConfig, config_name="sweep", outputs=False, positional=("dir",))
