"""`python -m mbfn.status DIR`: what the runs under a directory are doing now."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mbfn.config.command import RunContext, hydra_main
from mbfn.errors import DataError
from mbfn.launch.runs import RunStatus, find_runs, statuses
from mbfn.launch.table import aligned, table


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """Whose state to show."""

    dir: str = "."  # of one run, a sweep, or many


def runs_under(directory: str) -> tuple[Path, list[RunStatus]]:
    """The directory and the state of every run at or under it.

    Raises: DataError where there is none.
    """
    root = Path(directory).expanduser().absolute()
    found = statuses(find_runs(root))
    if not found:
        raise DataError(f"dir: no run at or under {root}; give the directory of a run or of a sweep (multirun)")
    return root, found


def status(config: StatusConfig, context: RunContext) -> None:
    """Print one line a run, and how many are in each state."""
    del context
    root, runs = runs_under(config.dir)
    sys.stdout.write(aligned(table(runs, root)))
    counts = Counter(run.state for run in runs)
    print(f"{len(runs)} runs: " + ", ".join(f"{number} {state}" for state, number in sorted(counts.items())))


if __name__ == "__main__":
    hydra_main(status, root=StatusConfig, config_name="status", outputs=False, positional=("dir",))
