"""Makes rank 1 of a run fail as SABOTAGE says: found by Python when this folder is on its path.

Read by every Python process that the test starts; those that are no rank 1 are let be.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

KIND = os.environ.get("SABOTAGE", "")
DONE = Path(os.environ.get("SABOTAGE_DONE", "/nonexistent/done"))  # the failure that is over: none after it
CALLS = 5


def _fail(text: str) -> None:
    DONE.touch()
    raise ValueError(text)


def _due(module: object) -> bool:
    """Whether this is the fifth pass through the output layer."""
    if type(module).__name__ == "ColumnParallelLinear" and module.weight.shape[0] >= 256:  # type: ignore[attr-defined]
        _passes.append(0)
    return len(_passes) == CALLS


def _before(module: object, *rest: object) -> None:
    if _due(module):
        _fail("sabotage in forward")


def _after(module: object, inputs: object, outputs: tuple) -> None:
    if _due(module) and outputs[0].requires_grad:
        outputs[0].register_hook(lambda grad: _fail("sabotage in backward"))


_passes: list[int] = []


def _install() -> None:
    from torch.nn.modules import module

    if KIND == "forward":
        module.register_module_forward_pre_hook(_before)
    elif KIND == "backward":
        module.register_module_forward_hook(_after)
    elif KIND in ("data", "hang"):
        import time

        import mbfn.train.step as steps

        read = steps.read_batch

        def read_batch(split: object, run: object, step: int, rank: int) -> object:
            if step == CALLS and KIND == "data":
                _fail("sabotage in data")
            while step == CALLS:
                time.sleep(1)
            return read(split, run, step, rank)  # type: ignore[arg-type]

        steps.read_batch = read_batch  # type: ignore[assignment]


if KIND and os.environ.get("RANK") == "1" and not DONE.exists() and "mbfn" in " ".join(sys.orig_argv):
    _install()
