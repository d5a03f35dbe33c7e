"""Experts' own products: values by Triton's interpreter, what they compile to, and where they give way."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from megatron.core.activations import squared_relu

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.megatron import grouped_kernel
from mbfn.megatron.own_products import obstacle
from mbfn.megatron.settings import core_config
from tests.megatron.mixtures import mixture
from tests.megatron.tiny import config_of
from tests.megatron.triton_kernels import check_interpreted, compiled

HOPPER = (9, 0)
_BF16 = triton.language.bfloat16


@pytest.mark.parametrize("name", ["kernels", "experts"])
def test_values_are_those_of_plain_torch_and_of_megatron(name: str) -> None:
    check_interpreted("tests.megatron.grouped_values", name)


@pytest.mark.parametrize("inner_last", [True, False])
def test_products_load_all_they_multiply_ahead_by_16_bytes(inner_last: bool) -> None:
    constants = {
        "EXPERTS": 128,
        "COLS": 1536,
        "INNER": 2048,
        "INNER_LAST": inner_last,
        "ALIGNED": True,
        "WEIGHT": _BF16,
        "FIELDS": 3,
    }
    pointers = {"x": "*bf16", "out": "*bf16", "weights": "*i64", "offsets": "*i32", "blocks": "*i32"}
    _check_loads(grouped_kernel._product, pointers, constants, grouped_kernel.PRODUCT)


def test_gradients_load_all_they_multiply_ahead_by_16_bytes() -> None:
    constants = {
        "EXPERTS": 128,
        "ROWS": 1536,
        "COLS": 2048,
        "ALIGNED": True,
        "GRAD": _BF16,
    }
    pointers = {"dy": "*bf16", "x": "*bf16", "grads": "*i64", "offsets": "*i32"}
    _check_loads(grouped_kernel._add_gradient, pointers, constants, grouped_kernel.GRADIENT)


def _check_loads(kernel: Any, pointers: dict, constants: dict, tile: grouped_kernel.Tile) -> None:
    constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLS": tile.cols, "BLOCK_INNER": tile.inner}
    constants |= {"GROUP": tile.group, "LOOP": tile.loop > 0}
    made = compiled(kernel, pointers, constants, warps=tile.warps, stages=tile.stages)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", made.asm["ptx"])
    elements = (tile.rows + tile.cols) * tile.inner
    assert len(copies) == elements * 2 // 16 // (32 * tile.warps) * tile.stages
    assert set(copies) == {"0x10"}
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return config_of(mixture("qwen3_moe"))


def _on_gpu(model: ModelConfig) -> SimpleNamespace:
    """The config of a GPU with Transformer Engine, as much of it as can be made here."""
    config = core_config(model, ParallelConfig(), PrecisionConfig(params="bf16"), impl="local", cpu=True)
    on_gpu = dict.fromkeys(("moe_grouped_gemm", "gradient_accumulation_fusion", "bias_activation_fusion"), True)
    return SimpleNamespace(**(vars(config) | on_gpu | {"moe_ffn_hidden_size": 32}))


def test_plain_experts_of_one_rank_on_hopper_are_taken(model: ModelConfig) -> None:
    assert obstacle(_on_gpu(model), HOPPER) is None  # type: ignore[arg-type]
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    assert obstacle(SimpleNamespace(**(vars(_on_gpu(model)) | recomputed)), HOPPER) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"expert_model_parallel_size": 2}, "several ranks"),
        ({"expert_tensor_parallel_size": 2}, "several ranks"),
        ({"moe_token_dispatcher_type": "allgather"}, "dispatcher"),
        ({"params_dtype": torch.float32}, "16 bits"),
        ({"fp8": "hybrid"}, "FP8"),
        ({"gradient_accumulation_fusion": False}, "gradients apart"),
        ({"add_bias_linear": True}, "biases"),
        ({"activation_func": F.gelu}, "activation"),
        ({"gated_linear_unit": False, "activation_func": squared_relu}, "activation"),
        ({"bias_activation_fusion": False}, "activation"),
        ({"moe_apply_probs_on_input": True}, "weights before"),
        ({"moe_expert_capacity_factor": 1.0}, "dropped"),
        ({"cuda_graph_impl": "transformer_engine"}, "graphs"),
        ({"delay_wgrad_compute": True}, "delayed"),
        ({"overlap_moe_expert_parallel_comm": True}, "delayed"),
        ({"fine_grained_activation_offloading": True, "offload_modules": ["moe_act"]}, "CPU"),
        ({"cpu_offloading": True}, "CPU"),
        ({"moe_ffn_hidden_size": 40}, "sizes"),
        ({"num_moe_experts": 1024}, "too many"),
    ],
)
def test_other_experts_stay_with_transformer_engine(model: ModelConfig, changes: dict, wanted: str) -> None:
    config = SimpleNamespace(**(vars(_on_gpu(model)) | changes))
    assert wanted in (obstacle(config, HOPPER) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [None, (8, 0), (10, 0)])
def test_other_gpus_stay_with_transformer_engine(model: ModelConfig, capability: tuple[int, int] | None) -> None:
    assert obstacle(_on_gpu(model), capability) == "measured on Hopper alone"  # type: ignore[arg-type]
