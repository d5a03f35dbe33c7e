"""Transformer Engine's Adam with its update in one pass over memory, clipping included: where a run takes it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from mbfn.config.run import RunConfig
from mbfn.convert.table import Impl
from mbfn.megatron.optimizer_state import parts_of


def updates_in_one_pass(run: RunConfig, impl: Impl) -> bool:
    """Whether every state of the run's optimizer is of a format, and in a place, that the kernel takes."""
    precision, optim = run.precision, run.optim
    return (
        impl == "te"
        and optim.optimizer == "adamw"
        and not optim.optimizer_offload_fraction
        and run.parallel.sharding in ("none", "zero1")
        and precision.main_params == "fp32"
        and "fp16" not in (precision.exp_avg, precision.exp_avg_sq)
        and not precision.fp8_param_gather
    )


def gather_update(optimizer: MegatronOptimizer) -> None:
    """Find the tensors of the next update, which the host can do while the device is still busy with gradients."""
    for part in _own(optimizer):
        part.gather()


def clip_update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Have the next update of the parts that clip gradients themselves do so, given the norm of the whole gradient."""
    for part in _own(optimizer):
        part.clip_to(grad_norm)


def _own(optimizer: MegatronOptimizer) -> Iterator[Any]:
    return (part.optimizer for part in parts_of(optimizer) if hasattr(part.optimizer, "clip_to"))


def one_pass_adam(max_norm: float) -> type:
    """Transformer Engine's Adam with the same states, whose gradients are clipped to `max_norm` while they are read."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    return type("OnePassAdam", (with_one_pass(FusedAdam),), {"max_norm": max_norm})


@functools.cache
def with_one_pass(adam: type) -> type:
    """`adam`, that holds weights and states as Transformer Engine's does, with an update by the kernel."""
    from mbfn.megatron.adam_kernel import Batch, Rates, Weight, adamw, batched

    class OnePassAdam(adam):
        max_norm: float

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.clip, self.gathered = 1.0, False
            self.batches: dict[int, tuple[Batch, ...]] = {}  # of each group, kept while tensors stay where they are

        def clip_to(self, grad_norm: float) -> None:
            """Scale the gradients of the next step as Megatron would have."""
            self.clip = min(1.0, self.max_norm / (grad_norm + 1e-6))

        def gather(self) -> None:
            """Find the tensors of the next step: every weight with a gradient."""
            for number, group in enumerate(self.param_groups):
                weights = [found for param in group["params"] if (found := self.weight(param)) is not None]
                self.batches[number] = batched(weights, self.batches.get(number, ()))
            self.gathered = True

        @torch.no_grad()
        def step(self, closure: None = None, grad_scaler: None = None) -> None:
            """One update of them."""
            if not self.gathered:
                self.gather()
            for number, group in enumerate(self.param_groups):
                group["step"] = group.get("step", 0) + 1  # of an empty group too: ranks agree on it
                beta1, beta2 = group["betas"]
                rates = Rates(
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=group["step"],
                    clip=self.clip,
                )
                for batch in self.batches[number]:
                    adamw(batch, rates)
            self.clip, self.gathered = 1.0, False

        def weight(self, param: torch.nn.Parameter) -> Weight | None:
            """A weight with its gradient and states; an fp32 one is its own master."""
            grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
            if grad is None:
                return None
            assert all(tensor.is_contiguous() for tensor in (param, grad))  # the kernel sees addresses alone
            state = self.state[param]
            if not state:
                self.initialize_state(param, self.store_param_remainders and param.dtype == torch.bfloat16)
            master = None if param.dtype == torch.float32 else state.get("master_param")
            moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            return Weight(weight=param.detach(), grad=grad, master=master, **moments)

    return OnePassAdam
