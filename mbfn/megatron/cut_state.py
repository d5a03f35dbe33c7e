"""Checkpoints of weights and states that are cut over data-parallel ranks: the same as those that are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from torch import nn
from torch.distributed.tensor import DTensor

from mbfn.megatron.model import LanguageModel
from mbfn.megatron.optimizer_boxes import STATE, boxes_of
from mbfn.megatron.stretches import stretch


def sharded_weights(chunk: LanguageModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """The chunk's sharded state dict; a cut weight is the boxes of its stretch, in the model's number format."""
    with _whole_shapes(chunk) as originals:
        state = chunk.sharded_state_dict(metadata=metadata)
    if not originals:
        return state
    dtype, found = chunk.config.params_dtype, {}
    for name, entry in state.items():
        param = originals.get(id(getattr(entry, "data", None)))
        if param is None:
            found[name] = entry
            continue
        vars(param)["whole_entry"] = entry
        own = stretch(param)
        flat = own.flat.to(dtype, copy=True)
        boxes = _numbered(boxes_of(entry, entry.key, flat, own.start))
        found[name] = {"flat": LocalNonpersistentObject(flat), **boxes}
    return found


def without_cut(state: dict[str, Any]) -> dict[str, Any]:
    """What of a loaded chunk is not cut. A cut weight is loaded with its optimizer's state, in fp32."""
    return {name: value for name, value in state.items() if not (isinstance(value, dict) and "flat" in value)}


def is_cut(part: Any) -> bool:
    """Whether an optimizer updates stretches of weights that the model itself holds so."""
    return any(isinstance(param, DTensor) for group in part.optimizer.param_groups for param in group["params"])


def cut_methods(part: Any) -> dict[str, Callable]:
    """What takes the place of an optimizer's two methods that make and load its state."""
    return {
        "sharded_state_dict": lambda *_, **__: _sharded(part),
        "load_state_dict": lambda state: _load(part, state),
    }


def _sharded(part: Any) -> dict[str, Any]:
    groups = part.optimizer.param_groups
    step = _step(part)
    kept = [{key: value for key, value in group.items() if key != "params"} | {"step": step} for group in groups]
    params = [param for group in groups for param in group["params"]]
    states = {}
    for number, param in enumerate(params):
        entry, cuts = param.whole_entry, {"param": param, **part.optimizer.state[param]}
        own = {name: stretch(param, value) for name, value in cuts.items() if isinstance(value, DTensor)}
        states[number] = {
            name: {"flat": LocalNonpersistentObject(held.flat)}
            | _numbered(boxes_of(entry, f"{STATE}.{name}.{entry.key}", held.flat, held.start))
            for name, held in own.items()
        }
    kind = {"param_state_sharding_type": "fully_reshardable"}  # as Megatron's distributed optimizer writes it
    return {"optimizer": {"param_groups": kept}, "param_state": states, **kind}


def _numbered(boxes: Iterator[ShardedTensor]) -> dict[str, Any]:
    """Boxes by number, and nothing where there are none: Megatron keeps empty containers in a checkpoint."""
    found = dict(enumerate(boxes))
    return {"boxes": found} if found else {}


def _load(part: Any, state: dict[str, Any]) -> None:
    """Set the count of updates; tensors are filled through their boxes."""
    step = float(state["optimizer"]["param_groups"][0]["step"])
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = int(step)
        for param in group["params"]:
            if "step" in part.optimizer.state[param]:
                part.optimizer.state[param]["step"] = torch.tensor(step)


def _step(part: Any) -> float:
    for group in part.optimizer.param_groups:
        for param in group["params"]:
            return float(part.optimizer.state[param].get("step", group.get("step", 0)))
    return 0.0


@contextlib.contextmanager
def _whole_shapes(chunk: LanguageModel) -> Iterator[dict[int, DTensor]]:
    """Inside, cut weights are empty ones of whole shape, by whose ids the dict has them."""
    places = [
        (module, name, param)
        for module in chunk.modules()
        for name, param in module._parameters.items()
        if isinstance(param, DTensor)
    ]
    stand_ins: dict[int, nn.Parameter] = {}
    for module, name, param in places:
        if id(param) not in stand_ins:
            shape = getattr(param, "orig_param", param).shape
            empty = torch.empty(shape, dtype=chunk.config.params_dtype, device="meta")
            stand_ins[id(param)] = nn.Parameter(empty, requires_grad=False)
            kept = (
                "shared",
                "shared_embedding",
                "allreduce",
                "tensor_model_parallel",
                "partition_dim",
                "partition_stride",
            )
            vars(stand_ins[id(param)]).update({key: vars(param)[key] for key in kept if key in vars(param)})
        module._parameters[name] = stand_ins[id(param)]
    try:
        yield {id(stand_ins[id(param)]): param for _, _, param in places}
    finally:
        for module, name, param in places:
            module._parameters[name] = param
