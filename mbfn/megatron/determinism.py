"""Kernels that give the same bits each time: one switch for torch, cuBLAS, Transformer Engine and NCCL."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

# Read when kernels are first chosen: cuBLAS's work space, Transformer Engine's attention, the order in NCCL's sums.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, kernels whose result depends on the order in which threads finish are not used, if `wanted`.

    Entered before the first CUDA call of the process, which reads some of this once.
    """
    if not wanted:
        yield
        return
    missing = {name: value for name, value in _DETERMINISTIC.items() if name not in os.environ}
    os.environ.update(missing)
    before, tuned = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = tuned
        for name in missing:
            del os.environ[name]
