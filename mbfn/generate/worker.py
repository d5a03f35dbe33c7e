"""One local rank of `python -m mbfn.generate`, with its options as a pickled value."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from mbfn.generate.text import write_text
from mbfn.launch.worker import run_rank

if __name__ == "__main__":
    task = Path(sys.argv[1])
    options = pickle.loads(task.read_bytes())
    run_rank(lambda: write_text(options), task.parent)
