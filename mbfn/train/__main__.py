"""`python -m mbfn.train`: train a model as the configuration says."""

from __future__ import annotations

import os
import sys

from mbfn.config.command import RunContext, hydra_main
from mbfn.config.run import RunConfig


def main(run: RunConfig, context: RunContext) -> float | None:
    """Check that the run can start here, then run it as its launch group says; its loss, for sweepers."""
    from mbfn.launch.results import result
    from mbfn.launch.start import start
    from mbfn.train.job import Job
    from mbfn.train.stop import listen

    stop = listen()
    job = Job(run=run, output_dir=context.output_dir, command=("python", "-m", "mbfn.train", *context.overrides))
    if code := start(job, stop, os.environ):
        sys.exit(code)
    return result(context.output_dir)


if __name__ == "__main__":
    from mbfn.families import model_from_hf

    hydra_main(main, root=RunConfig, config_name="config", model_from_hf=model_from_hf)
