"""Triton's kernels beside plain torch, by its interpreter.

    TRITON_INTERPRET=1 python -m tests.megatron.kernel_values NAME

The interpreter is chosen when a kernel is defined, so each check is a process of its own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mbfn.megatron.adam import with_one_pass
from mbfn.megatron.adam_kernel import BLOCK, Rates, Weight, adamw, batched
from mbfn.megatron.optimizer_state import join_master, master_remainder
from mbfn.megatron.swiglu_kernel import swiglu_back, weighted_swiglu_back
from tests.megatron.triton_kernels import check_close, shifted

RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, clip=0.7)
_BF16, _FP32 = torch.bfloat16, torch.float32
_close = partial(check_close, small=0.1)
_KINDS = (  # formats of weight, gradient, moments; how the master is kept
    (_BF16, _BF16, _BF16, _BF16, "remainder"),
    (_BF16, _FP32, _FP32, _FP32, "remainder"),
    (_BF16, _FP32, _BF16, _FP32, "fp32"),
    (_FP32, _FP32, _FP32, _FP32, "none"),
)


def adam() -> None:
    """Two updates of tensors of many lengths, some of which start off a multiple of 16 bytes, in one call each."""
    made = [
        _made(length, kind, shift) for length, shift in ((3 * BLOCK + 16, 0), (77, 0), (BLOCK, 3)) for kind in _KINDS
    ]
    weights = [weight for weight, _ in made]
    masters = [master for _, master in made]
    batches = batched(weights)
    assert len(batches) == 2 * len(_KINDS), "one batch for each kind and alignment"
    for step in (3, 4):
        rates = replace(RATES, step=step)
        wanted = [_adamw(weight, master, rates) for weight, master in zip(weights, masters, strict=True)]
        again = batched(weights, batches)
        assert all(a is b for a, b in zip(again, batches, strict=True)), "tensors that stayed where they were"
        for batch in batches:
            adamw(batch, rates)
        for weight, (master, first, second) in zip(weights, wanted, strict=True):
            _close(_master(weight), master, 1e-6)
            _close(weight.weight, master, 1e-6 if weight.weight.dtype == _FP32 else 8e-3)
            _close(weight.exp_avg, first.to(weight.exp_avg.dtype), 1e-6 if weight.exp_avg.dtype == _FP32 else 8e-3)
            _close(weight.exp_avg_sq, second, 1e-6 if weight.exp_avg_sq.dtype == _FP32 else 8e-3)
        masters = [_master(weight).clone() for weight in weights]


class Holder(torch.optim.Optimizer):
    """What Transformer Engine's Adam is beside its update: fp32 weights and states, gradients apart."""

    use_decoupled_grad, store_param_remainders = True, False

    def initialize_state(self, param: Tensor, remainders: bool) -> None:
        assert not remainders
        self.state[param].update({name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")})


def optimizer() -> None:
    """Clipped steps of two groups beside torch's AdamW; one weight has no gradient at first, one group none at all."""
    adam = type("Adam", (with_one_pass(Holder),), {"max_norm": 0.5})
    start = [torch.randn(size) for size in (40, 3 * BLOCK, 16, 5)]
    own, other = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    rates = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    decays = ((0.1, [0, 1]), (0.0, [2]), (0.2, [3]))
    ours = adam([{"params": [own[i] for i in held], "weight_decay": decay} for decay, held in decays], rates)
    theirs = torch.optim.AdamW(
        [{"params": [other[i] for i in held], "weight_decay": decay} for decay, held in decays], **rates
    )
    for step in range(3):
        for i, size in enumerate((40, 3 * BLOCK, 16)):
            grad = None if i == 0 and step == 0 else torch.randn(size) * 10.0**-step
            own[i].decoupled_grad, other[i].grad = grad, None if grad is None else grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(other, 0.5)
        if step != 1:
            ours.gather()  # the device may still be busy then
        ours.clip_to(float(norm))
        ours.step()
        theirs.step()
        if step == 0:
            # Transformer Engine counts the updates of a group, torch those of a weight.
            theirs.state[other[0]].update(step=torch.tensor(1.0), exp_avg=torch.zeros(40), exp_avg_sq=torch.zeros(40))
    for mine, wanted in zip(own, other, strict=True):
        _close(mine.detach(), wanted.detach(), 1e-5)
    assert [group["step"] for group in ours.param_groups] == [3, 3, 3]


def swiglu() -> None:
    """Gradients by input and by weight of rows narrower and wider than a block."""
    for rows, width in ((3, 5), (2, 1500), (4, 768), (0, 8)):
        inputs, grad, weights = torch.randn(rows, 2 * width), torch.randn(rows, width), torch.rand(rows, 1)
        wanted, leaf = weights.clone().requires_grad_(), inputs.clone().requires_grad_()
        a, b = leaf.chunk(2, dim=-1)
        (F.silu(a) * b * wanted).backward(grad)
        found, by_weight = weighted_swiglu_back(grad, inputs, weights)
        _close(found, leaf.grad, 1e-6)
        _close(by_weight, wanted.grad, 1e-5)
        leaf.grad = None
        (F.silu(a) * b).backward(grad)
        _close(swiglu_back(grad, inputs), leaf.grad, 1e-6)


def _made(length: int, kind: tuple, shift: int) -> tuple[Weight, Tensor]:
    """A weight of random state that starts `shift` elements into its storage, and its fp32 master."""
    of_weight, of_grad, of_first, of_second, kept = kind

    master = torch.randn(length)
    remainder = master_remainder(master)
    weight = master.to(of_weight)
    if kept == "remainder":
        weight = ((master.view(torch.int32) - remainder.int()) >> 16).to(torch.int16).view(_BF16)
    masters = {"none": None, "remainder": remainder, "fp32": master.clone()}
    found = Weight(
        weight=shifted(weight, shift),
        grad=shifted(torch.randn(length).to(of_grad), shift),
        exp_avg=shifted((torch.randn(length) * 0.1).to(of_first), shift),
        exp_avg_sq=shifted((torch.rand(length) * 0.1).to(of_second), shift),
        master=None if masters[kept] is None else shifted(masters[kept], shift),
    )
    return found, master


def _master(weight: Weight) -> Tensor:
    if weight.kind == "remainder":
        return join_master(weight.weight, weight.master)
    return weight.weight if weight.master is None else weight.master


def _adamw(weight: Weight, master: Tensor, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """Master and moments after the update, by the formulae of the paper."""
    grad = weight.grad.float() * rates.clip
    first = rates.beta1 * weight.exp_avg.float() + (1 - rates.beta1) * grad
    second = rates.beta2 * weight.exp_avg_sq.float() + (1 - rates.beta2) * grad.square()
    root = (second / (1 - rates.beta2**rates.step)).sqrt() + rates.eps
    change = first / (1 - rates.beta1**rates.step) / root + rates.weight_decay * master
    return master - rates.lr * change, first, second


if __name__ == "__main__":
    torch.manual_seed(0)
    {"adam": adam, "optimizer": optimizer, "swiglu": swiglu}[sys.argv[1]]()
    print("passed", sys.argv[1])
