"""`python -m mbfn.train`: train a model as the configuration says, or go on with a run: `resume=DIR`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mbfn.config.command import RunContext, end_with, hydra_main
from mbfn.config.run import RunConfig
from mbfn.errors import MbfnError


def main(run: RunConfig, context: RunContext, resumed: str = "") -> float | None:
    """Check that the run can start here, then run it as its launch group says; its loss, for sweepers."""
    from mbfn.launch.results import result
    from mbfn.launch.start import start
    from mbfn.train.job import Job
    from mbfn.train.stop import listen

    stop = listen()
    command = ("python", "-m", "mbfn.train", *filter(None, [resumed]), *context.overrides)
    job = Job(run=run, output_dir=context.output_dir, command=command)
    if code := start(job, stop, os.environ):
        sys.exit(code)
    return result(context.output_dir)


def go_on(directory: Path) -> None:
    """`main` for the run that `directory` records. What the command line asks for besides may not contradict it."""
    from mbfn.train.again import NAME, recorded_arguments, recorded_run, refuse_contradiction

    before = recorded_run(directory)

    def continued(run: RunConfig, context: RunContext) -> float | None:
        refuse_contradiction(directory, before, run)
        return main(run, context, resumed=f"resume={directory}")

    with recorded_arguments(directory, sys.argv[1:]) as arguments:
        sys.argv[1:] = arguments
        hydra_main(continued, root=RunConfig, config_name=NAME)


def start_or_go_on() -> None:
    """What the command line asks for."""
    from mbfn.families import model_from_hf
    from mbfn.train.again import directory_of

    try:
        directory = directory_of(sys.argv[1:])
        if directory is not None:
            return go_on(directory)
    except MbfnError as error:
        end_with(error)
    return hydra_main(main, root=RunConfig, config_name="config", model_from_hf=model_from_hf)


if __name__ == "__main__":
    start_or_go_on()
