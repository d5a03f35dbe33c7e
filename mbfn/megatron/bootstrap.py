"""The first import of megatron-core: without its warnings and, where no GPU can use them, its compiled kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Megatron's calls that newer torch warns of on every rank.
_NOISE = (
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"torch\.distributed is disabled, unavailable or uninitialized",
    r"The argument order of load has been changed",
    r"Please use DTensor instead",
)
_WGRAD = "fused_weight_gradient_mlp_cuda"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can run here."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def _load_core() -> None:
    """Import megatron-core.

    It applies `torch.compile` to its fused functions at import. Without a GPU those are plain functions here: that
    saves a second of imports, seconds at each first call, and the need for a C++ compiler.
    """
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if has_transformer_engine() and importlib.util.find_spec(_WGRAD) is None:
        sys.modules[_WGRAD] = _wgrad_module()
    eager = _static_shapes() if torch.cuda.is_available() else _no_compile()
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    with warnings.catch_warnings(), eager:
        warnings.simplefilter("ignore")
        importlib.import_module("megatron.core")  # a plain import would look unused


@contextlib.contextmanager
def _static_shapes() -> Iterator[None]:
    """Compile fused functions, those without a kernel here, for each shape: at the second one torch else makes a
    kernel for all, 3 times slower.

    But for those of experts, whose tokens differ from call to call: past eight shapes torch compiles none.
    """
    import torch._dynamo

    torch._dynamo.config.automatic_dynamic_shapes = False
    compiler, kernels = torch.compile, _own_kernels()

    def compiled(function: Callable | None = None, **settings: Any) -> Callable:
        if function is None:
            return functools.partial(compiled, **settings)
        if function.__name__ in kernels:
            return kernels[function.__name__]
        made = compiler(function, **settings)
        return of_any_length(made) if function.__name__.startswith("weighted_") else made

    torch.compile = compiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _own_kernels() -> dict[str, Callable]:
    """By the names of Megatron's functions that they stand for."""
    from mbfn.megatron.swiglu_kernel import swiglu_back, weighted_swiglu_back

    return {"swiglu_back": swiglu_back, "weighted_swiglu_back": weighted_swiglu_back}


def of_any_length(function: Callable) -> Callable:
    """A compiled function of tensors with a kernel for the first number of rows, and one for all others."""
    lengths = set[int]()

    @functools.wraps(function)
    def call(*given: Any, **settings: Any) -> Any:
        rows = [value for value in given if isinstance(value, torch.Tensor) and value.dim() > 1]
        if len(lengths) < 2:
            lengths.add(rows[0].size(0))
        if len(lengths) > 1:
            for tensor in rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return function(*given, **settings)

    return call


@contextlib.contextmanager
def _no_compile() -> Iterator[None]:
    compiler = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _unchanged(function: Callable | None = None, **_: Any) -> Callable:
    return _unchanged if function is None else function


def _wgrad_module() -> types.ModuleType:
    """Apex's extension, which Megatron's output layer wants for gradient accumulation fusion, made of TE's product."""

    def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        out = {"out_dtype": main_grad.dtype, "out": main_grad}
        general_gemm(total_input, grad_output, layout="NT", accumulate=True, grad=True, **out)

    module = types.ModuleType(_WGRAD)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    return module


_load_core()
