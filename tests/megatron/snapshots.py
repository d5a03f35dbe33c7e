"""All that a rank trains, as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mbfn.megatron import Models
from mbfn.megatron.optimizer import gathered


def state_bytes(models: Models) -> dict[str, bytes]:
    """Weights by name, and every tensor of the optimizer by its place."""
    with gathered(models):
        return _bytes(models)


def _bytes(models: Models) -> dict[str, bytes]:
    found = {
        f"{number}.{name}": p for number, chunk in enumerate(models.chunks) for name, p in chunk.named_parameters()
    }
    found |= dict(_tensors(models.optimizer.state_dict(), "optimizer"))
    return {
        name: tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in found.items()
    }


def _tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value.reshape(-1)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _tensors(inner, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _tensors(inner, f"{path}.{number}")
