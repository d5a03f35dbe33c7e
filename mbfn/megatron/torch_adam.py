"""What Megatron's optimizers lack when their AdamW is torch's (no Apex, no Transformer Engine): exact save and load."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def prime(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW state as its first step would: a checkpoint before that step, and loading one, need it."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                if not part.optimizer.state[param]:
                    part.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
                    }


def load_optimizer(optimizer: MegatronOptimizer, state: Any) -> None:
    """Set an optimizer from what `dist_checkpointing.load` returned for it, so that the next step is the one it had."""
    parts = [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in parts:
        part._set_main_param_and_optimizer_states = _tolerant(part._set_main_param_and_optimizer_states)
    try:
        optimizer.load_state_dict(state)
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states
    for part in parts:
        _own_steps(part.optimizer)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of a chain whose AdamW is torch's."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if isinstance(part.optimizer, torch.optim.AdamW)]


def _tolerant(set_states: Any) -> Any:
    """Megatron's setter, which looks up the `step` that torch keeps as a tensor and its checkpoint does not hold."""

    def set_all(model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            set_states(model_param, {"step": None, **tensors})

    return set_all


def _own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Megatron hands one step tensor to all parameters, and torch would then count it once for each of them."""
    for group in optimizer.param_groups:
        step = float(group.pop("step"))
        for param in group["params"]:
            optimizer.state[param]["step"] = torch.tensor(step)
