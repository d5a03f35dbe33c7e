"""`python -m mbfn.generate`: text from a Hugging Face directory, a Megatron checkpoint or a run."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path

from mbfn.config.command import RunContext, hydra_main
from mbfn.generate.options import GenerateConfig
from mbfn.generate.source import find_source
from mbfn.launch.detect import detect, rank_environment


def main(config: GenerateConfig, context: RunContext) -> None:
    """Print the text; as a rank of torchrun or srun, or with as many ranks here as the layout has."""
    del context
    rank = detect(os.environ)
    if rank is not None:
        os.environ.update(rank_environment(rank, os.environ))
    if rank is not None or config.parallel.world_size == 1:
        from mbfn.generate.text import write_text

        write_text(config)
        return
    find_source(config)  # mistakes show here, once
    _start_ranks(config)


def _start_ranks(config: GenerateConfig) -> None:
    from mbfn.launch.local import run_local

    with tempfile.TemporaryDirectory(prefix="mbfn-generate-") as scratch:
        task = Path(scratch) / "options.pickle"
        task.write_bytes(pickle.dumps(config))
        command = (sys.executable, "-u", "-m", "mbfn.generate.worker", str(task))
        stopped = run_local(command, config.parallel.world_size, Path(scratch))
    if stopped is not None:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    hydra_main(main, root=GenerateConfig, config_name="generate", outputs=False, positional=("prompt",))
