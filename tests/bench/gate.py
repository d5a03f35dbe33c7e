"""Start a Python program whose imports run while another one still measures: `gate.py LOCK IMPORTS PROGRAM ...`.

IMPORTS are comma-separated; PROGRAM is a file, or a module where it does not end in `.py`. The program itself starts
when LOCK is free and the GPU's memory is given back.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

_IDLE_MIB, _PATIENCE_S = 2048, 30


def main() -> None:
    lock, imports, program, *arguments = sys.argv[1:]
    for name in filter(None, imports.split(",")):
        importlib.import_module(name)
    with Path(lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _wait_for_memory()
        sys.argv = [program, *arguments]
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)


def _wait_for_memory() -> None:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        if max(map(int, used)) < _IDLE_MIB:
            return
        time.sleep(0.2)


if __name__ == "__main__":
    main()
