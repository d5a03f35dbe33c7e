"""Optimizer states that survive a checkpoint exactly: what Megatron's own save and load leave out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import megatron.core.optimizer.distrib_optimizer as core_optimizer
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mbfn.megatron.cut_state import cut_methods, is_cut
from mbfn.megatron.device import attributes
from mbfn.megatron.optimizer_boxes import box_methods


def prime(optimizer: MegatronOptimizer) -> None:
    """Make states as the first step would: a checkpoint before that step, and loading one, need them."""
    for part in parts_of(optimizer):
        if type(part.optimizer).__name__ in ("SGD", "FusedSGD"):
            part.init_state_fn = _no_momentum  # Megatron has none for SGD, and calls it before it loads
            _no_momentum(part.optimizer)
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                part.optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _no_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


@contextlib.contextmanager
def exact_states(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, distributed optimizers give and take their own share of every state, in fp32, master weights whole."""
    with contextlib.ExitStack() as stack:
        # Megatron collects garbage after gathering; here nothing is gathered, and it would take half a second.
        stack.enter_context(attributes(core_optimizer, {"gc": SimpleNamespace(collect=lambda: 0)}))
        for part in parts_of(optimizer):
            if is_cut(part):
                stack.enter_context(attributes(part, cut_methods(part)))
            elif isinstance(part, DistributedOptimizer):
                changed: dict[str, Any] = {
                    "_get_main_param_and_optimizer_states": _getter(part),
                    "_set_main_param_and_optimizer_states": _setter(part),
                    **box_methods(part),
                }
                if isinstance(part.optimizer, torch.optim.AdamW) and not part.optimizer.state:
                    changed["state_dict"] = _empty_state(part, _step(optimizer))
                stack.enter_context(attributes(part, changed))
        yield


def load_optimizer(optimizer: MegatronOptimizer, state: Any) -> None:
    """Set an optimizer from what `dist_checkpointing.load` returned for it, so that the next step is the one it had."""
    parts = parts_of(optimizer)
    whole = _as_many(state, len(parts))
    for number, part in enumerate(parts):
        _with_step(whole if len(parts) == 1 else whole[number], part)
    with exact_states(optimizer):
        optimizer.load_state_dict(whole)
    for part in parts_of(optimizer):
        uncut = isinstance(part, DistributedOptimizer) and not is_cut(part)
        if uncut and isinstance(part.optimizer, torch.optim.AdamW):
            _own_steps(part.optimizer)


def before_update(optimizer: MegatronOptimizer, wait: Callable[[], None]) -> None:
    """Have the next update of each part call `wait` before it changes anything."""
    for part in parts_of(optimizer):
        waits = vars(part).get("waits_before_update")
        if waits is None:  # one hook for good: none may leave while an update calls them
            waits = part.waits_before_update = []
            part.optimizer.register_step_pre_hook(functools.partial(_call_all, waits))
        waits.append(wait)


def _call_all(waits: list[Callable[[], None]], *_: Any) -> None:
    while waits:
        waits.pop()()


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 weight of which Transformer Engine keeps a bf16 and, as int16, how far its bits lie from it.

    Inverse: `master_remainder`.
    """
    bits = (param.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def master_remainder(master: Tensor) -> Tensor:
    """The low 16 bits of an fp32 weight, signed: the bf16 beside them is the weight rounded to nearest."""
    return master.contiguous().view(torch.int32).to(torch.int16)


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that it is made of, one where it is no chain."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _as_many(state: dict, parts: int) -> dict:
    """A checkpoint's state for as many optimizers as there are.

    Experts have an optimizer of their own where they are spread over ranks, and a run's layout decides that. Tensors
    come by the name of their weight; what is left is the settings of parameter groups, alike for both.
    """
    if parts == 1 and "optimizer" not in state and 0 in state:
        own = {key: value for key, value in state.items() if key not in (0, 1)}
        return own | {key: value for key, value in state[0].items() if key not in own}
    if parts == 2 and "optimizer" in state:
        common = {key: value for key, value in state.items() if key not in (0, 1)}
        groups = [group | {"is_expert_parallel": True} for group in common["optimizer"]["param_groups"]]
        experts = common | {"optimizer": common["optimizer"] | {"param_groups": groups}}
        return {0: common | state.get(0, {}), 1: experts | state.get(1, {})}
    return state


def _with_step(state: dict[str, Any], part: Any) -> None:
    """Megatron leaves out the step of an optimizer that has made none, as when fp16 overflowed so far."""
    states = state.get("optimizer", state).get("state")
    if isinstance(part.optimizer, torch.optim.AdamW) and not isinstance(part, DistributedOptimizer) and states:
        states.setdefault("common_step", torch.tensor(0.0))


def _empty_state(part: DistributedOptimizer, step: float) -> Callable[[], dict[str, Any]]:
    """The state of an optimizer without parameters: a pipeline stage without experts has one for experts."""

    def state() -> dict[str, Any]:
        groups = part.optimizer.state_dict()["param_groups"]
        kept = [{key: value for key, value in group.items() if key != "params"} | {"step": step} for group in groups]
        scaler = {"grad_scaler": part.grad_scaler.state_dict()} if part.grad_scaler else {}
        return {"optimizer": {"param_groups": kept}, **scaler}

    return state


def _step(optimizer: MegatronOptimizer) -> float:
    """Updates made so far: the same in every part that has parameters."""
    states = (state for part in parts_of(optimizer) for state in part.optimizer.state.values())
    return next((float(state["step"]) for state in states), 0.0)


def _getter(part: DistributedOptimizer) -> Callable[[torch.nn.Parameter], dict[str, Tensor]]:
    """Megatron's getter, which would give the remainders of bf16 weights for the weights."""
    get = part._get_main_param_and_optimizer_states

    def states(model_param: torch.nn.Parameter) -> dict[str, Tensor]:
        tensors = get(model_param)
        if tensors["param"].dtype == torch.int16:
            group, order = part.model_param_group_index_map[model_param]
            shard = part.optimizer.param_groups[group]["params"][order]
            tensors["param"] = join_master(shard.detach(), tensors["param"])
        return tensors

    return states


def _setter(part: DistributedOptimizer) -> Callable[[torch.nn.Parameter, dict[str, Any]], None]:
    """Megatron's setter; it also looks up the `step` that torch keeps as a tensor, which a checkpoint does not hold."""
    put, config = part._set_main_param_and_optimizer_states, part.config
    aware = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    remainders = aware and config.store_param_remainders and config.bf16

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        if remainders:
            tensors = {**tensors, "param": master_remainder(tensors["param"])}
        with torch.no_grad():
            put(model_param, {"step": None, **tensors})

    return set_states


def _own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Megatron hands one step tensor to all parameters, and torch would then count it once for each of them."""
    for group in optimizer.param_groups:
        step = float(group.pop("step"))
        for param in group["params"]:
            optimizer.state[param]["step"] = torch.tensor(step)
