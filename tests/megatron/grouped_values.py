"""Experts' products beside plain torch and Megatron's own experts, by Triton's interpreter.

TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 python -m tests.megatron.grouped_values NAME
"""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from torch import Tensor, nn

import mbfn.megatron as megatron
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.megatron.grouped import LocalTokens, OwnExperts, built_of
from mbfn.megatron.grouped_kernel import Tile, add_gradient, grouped, product, table_of
from mbfn.megatron.settings import core_config
from mbfn.megatron.specs import layer_submodules
from tests.megatron.mixtures import mixture
from tests.megatron.tiny import config_of
from tests.megatron.triton_kernels import check_close, shifted

_COUNTS = ([5, 0, 33, 16, 0, 1, 64, 0], [0, 0, 0], [7], [0, 15, 32])
_FORMATS = (  # of tokens and weights, of gradient buffers; the interpreter multiplies no bf16
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
)


def kernels() -> None:
    """All three products, of sizes that are multiples of a block and that are not, a program a block or a loop."""
    for counts in _COUNTS:
        for sizes, loop in (((48, 32), 0), ((40, 24), 1)):
            for format_, of_grads in _FORMATS:
                _products(counts, sizes, loop, format_, of_grads)


def _products(counts: list[int], sizes: tuple[int, int], loop: int, of: torch.dtype, of_grads: torch.dtype) -> None:
    rows, (n, k) = sum(counts), sizes
    tile = Tile(rows=16, cols=32, inner=16, warps=4, stages=2, group=2, loop=loop)
    groups = grouped(torch.tensor(counts), rows, block_rows=16)
    x, dy = torch.randn(rows, k).to(of), torch.randn(rows, n).to(of)
    weights = [torch.randn(n, k).to(of) for _ in counts]
    grads = [shifted(torch.randn(n, k).to(of_grads), 1 if loop else 0) for _ in counts]
    before = [grad.clone() for grad in grads]
    table = table_of(weights)
    assert table_of(weights, table) is table, "weights that stayed where they were"
    y = product(x, table, groups, n, transposed=False, tile=tile)
    dx = product(dy, table, groups, k, transposed=True, tile=tile)
    add_gradient(dy, x, table_of(grads), groups, tile=tile)
    assert groups.offsets.tolist()[:-1] == [0, *torch.tensor(counts).cumsum(0).tolist()]
    assert groups.offsets.tolist()[-1] == sum(-(-count // 16) for count in counts)
    parts = zip(x.split(counts), dy.split(counts), y.split(counts), dx.split(counts), strict=True)
    for expert, (x_, dy_, y_, dx_) in enumerate(parts):
        weight = weights[expert].float()
        _close(y_, x_.float() @ weight.T, of)
        _close(dx_, dy_.float() @ weight, of)
        _close(grads[expert], before[expert].float() + dy_.float().T @ x_.float(), of_grads)


def experts() -> None:
    """A layer with experts, as Megatron's own with the same weights: outputs, gradients of two micro-batches, hooks."""
    with megatron.open_world(ParallelConfig(), device="cpu") as world:
        model = config_of(mixture("qwen3_moe"))
        config = core_config(model, ParallelConfig(), PrecisionConfig(), impl="local", cpu=True)
        spec = layer_submodules(model, "local", sparse=True).mlp
        other = functools.partial(
            TEGroupedMLP, submodules=GroupedMLPSubmodules(linear_fc1=OneByOne, linear_fc2=OneByOne)
        )
        own = replace(spec.keywords["submodules"], experts=built_of(other, OneByOne, OneByOne))
        layers = [spec.func(config, parts, 1, world.groups) for parts in (spec.keywords["submodules"], own)]
        assert isinstance(layers[1].experts, OwnExperts)
        dispatcher = LocalTokens(8, list(range(8)), config=config, pg_collection=world.groups)
        layers[1].token_dispatcher = dispatcher
        _same_weights(*layers)
        reduce = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
        _without_buffers(layers[1])
        ddp = [DistributedDataParallel(config, reduce, layer, pg_collection=world.groups) for layer in layers]
        for last in (False, True):
            given = [torch.randn(29, 2, 48)] * 2
            given = [x.clone().requires_grad_() for x in given]
            wanted, found = (wrapped(x)[0] for wrapped, x in zip(ddp, given, strict=True))
            _close(found, wanted, torch.float32)
            for out, wrapped in zip((wanted, found), ddp, strict=True):
                with contextlib.nullcontext() if last else wrapped.no_sync():
                    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            _close(given[1].grad, given[0].grad, torch.float32)
        for wrapped in ddp:
            wrapped.finish_grad_sync()  # which misses weights whose hook did not run
        _same_gradients(*layers)
        with torch.no_grad():
            _close(layers[1](given[0])[0], layers[0](given[0])[0], torch.float32)


def _without_buffers(layer: Any) -> None:
    """Gradients with nowhere to go but autograd: the experts are left to the class that holds the weights."""
    out, _ = layer(torch.randn(5, 2, 48))
    out.sum().backward()
    grads = [weight.grad for weight in layer.experts.parameters()]
    assert all(grad is not None for grad in grads)
    layer.zero_grad()


def _pairs(plain: Any, own: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    found = [(plain.router.weight, own.router.weight)]
    for i, expert in enumerate(plain.experts.local_experts):
        for name in ("linear_fc1", "linear_fc2"):
            found.append((getattr(expert, name).weight, getattr(getattr(own.experts, name), f"weight{i}")))
    return found


def _same_weights(plain: Any, own: Any) -> None:
    with torch.no_grad():
        for weight, same in _pairs(plain, own):
            assert weight.shape == same.shape
            weight.copy_(torch.randn_like(weight) * 0.3)
            same.copy_(weight)


def _same_gradients(plain: Any, own: Any) -> None:
    for i, (weight, same) in enumerate(_pairs(plain, own)):
        assert same.grad is None, "a hook drops what autograd is given"
        assert same.grad_added_to_main_grad or i == 0
        assert bool(weight.main_grad.any())
        _close(same.main_grad, weight.main_grad, torch.float32)


class OneByOne(nn.Module):
    """What holds the weights in place of Transformer Engine's class."""

    def __init__(self, experts: int, in_size: int, out_size: int, **_: Any) -> None:
        super().__init__()
        self.experts = experts
        for expert in range(experts):
            self.register_parameter(f"weight{expert}", nn.Parameter(torch.zeros(out_size, in_size)))

    def forward(self, x: Tensor, counts: list[int]) -> tuple[Tensor, None]:
        """Shapes: (T, K) -> (T, N)."""
        parts = zip(x.split(counts), self.parameters(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts]), None


def _close(found: Tensor | None, wanted: Tensor | None, of: torch.dtype) -> None:
    check_close(found, wanted, 2e-5 if of == torch.float32 else 1e-2, small=1.0)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"kernels": kernels, "experts": experts}[sys.argv[1]]()
    print("passed", sys.argv[1])
