"""Matrix products below 16 bits: Megatron's settings, what the GPU at hand runs, and who agrees on scales."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.models.gpt import gpt_model
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mbfn.config.precision import Fp8Recipe, PrecisionConfig
from mbfn.config.recipes import attention_environment, recipes_of, resolved_precision
from mbfn.config.run import RunConfig
from mbfn.errors import LaunchError
from mbfn.megatron.bootstrap import has_transformer_engine
from mbfn.megatron.device import attributes

_DPA = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
_CHECKS: Mapping[Fp8Recipe, str] = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
    "nvfp4": "is_nvfp4_available",
}


def on_device(run: RunConfig, device: torch.device) -> RunConfig:
    """`run` with the recipe that its GPU takes in place of `auto`.

    Raises: LaunchError for a recipe that this GPU, or the Transformer Engine here, does not run.
    """
    if not (run.precision.quantized and device.type == "cuda" and has_transformer_engine()):
        return run
    capability = torch.cuda.get_device_capability(device)
    precision, _ = resolved_precision(run.precision, capability, torch.cuda.get_device_name(device))
    runs, why = _available(precision.fp8)
    if not runs:
        others = [recipe for recipe in recipes_of(capability) if _available(recipe)[0]]
        raise LaunchError(f"precision.fp8: {precision.fp8}: {why.rstrip('.')}; here fp8={', '.join(others)} runs")
    _set_attention(attention_environment(precision, capability))
    return run if precision == run.precision else replace(run, precision=precision)


def precision_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """The fields of Megatron's config."""
    settings: dict[str, Any] = {
        "fp8_dot_product_attention": precision.fp8_attention != "none",
        "activation_func_fp8_input_store": precision.activation_func_fp8_input_store,
        "first_last_layers_bf16": precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16 > 0,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }
    if not precision.quantized:
        return {}
    if precision.fp8 == "nvfp4":
        return settings | {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    wide = precision.fp8 in ("blockwise", "mxfp8")  # blocks hold gradients of one magnitude: no range of E5M2 needed
    settings |= {"fp8": "e4m3" if wide else "hybrid", "fp8_recipe": precision.fp8}
    settings |= {"fp8_param": precision.fp8_param_gather}
    if precision.fp8 == "delayed":
        settings |= {"fp8_amax_history_len": precision.fp8_amax_history_len, "fp8_amax_compute_algo": "max"}
    return settings


def gather_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """The fields of Megatron's gradient reduction for weights that are kept in FP8."""
    if not precision.fp8_param_gather:
        return {}
    return {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": precision.fp8 == "mxfp8"}


def optimizer_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """The fields of Megatron's optimizer for them. Without such weights it needs no recipe, and no fp32 copy."""
    if not precision.fp8_param_gather:
        return {}
    return {"fp8_recipe": precision.fp8, "reuse_grad_buf_for_mxfp8_param_ag": precision.fp8 == "mxfp8"}


@contextlib.contextmanager
def output_layer(*, in_fp8: bool) -> Iterator[None]:
    """Models built inside multiply by the output layer in the layers' recipe, which Megatron has for mxfp8 alone."""
    if not in_fp8:
        yield
        return
    wanted = {"is_mxfp8_output_proj_active": lambda _: True}
    with attributes(gpt_model, wanted), attributes(fp8_utils, wanted):
        yield


@contextlib.contextmanager
def agreeing_scales(groups: ProcessGroupCollection) -> Iterator[None]:
    """Inside, the ranks that share a layer agree on its delayed scales; Megatron would ask its global groups."""
    found = SimpleNamespace(
        model_parallel_is_initialized=lambda: True, get_amax_reduction_group=lambda **_: groups.tp_dp_cp
    )
    with attributes(fp8_utils, {"parallel_state": found}):
        yield
    engine = sys.modules.get("transformer_engine.pytorch.quantization")
    if engine is not None:  # which keeps the scales of models that are gone
        engine.FP8GlobalStateManager.reset()


def set_weight(target: Tensor, value: Tensor) -> None:
    """Copy a weight; one kept in FP8 leaves the value for the optimizer's fp32 copy too."""
    target.copy_(value)
    if hasattr(target, "get_high_precision_init_val"):
        target._high_precision_init_val = value.detach().cpu().clone()  # type: ignore[attr-defined]


def in_full(weight: Tensor) -> Tensor:
    """A weight in 16 bits or more."""
    return fp8_utils.dequantize_fp8_tensor(weight) if fp8_utils.is_float8tensor(weight) else weight


def _available(recipe: Fp8Recipe) -> tuple[bool, str]:
    import transformer_engine.pytorch as te

    check = getattr(te, _CHECKS[recipe], None)
    return (True, "") if check is None else check(return_reason=True)


def _set_attention(environment: Mapping[str, str]) -> None:
    """Transformer Engine reads these once, when it is imported."""
    if not environment:
        return
    os.environ.update(environment)
    module = sys.modules.get(_DPA)
    if module is not None:
        module._dpa_fp8_recipe = environment["NVTE_DPA_FP8_RECIPE"]  # type: ignore[attr-defined]
        module._dpa_fp8ds_amax_algo = environment["NVTE_DPA_FP8DS_AMAX_ALGO"]  # type: ignore[attr-defined]
        module._dpa_fp8ds_amax_histlen = int(environment["NVTE_DPA_FP8DS_AMAX_HISTLEN"])  # type: ignore[attr-defined]
