"""Where experts take the products of `mbfn.megatron.grouped`: a pure choice, with its reason."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

Capability = tuple[int, int]
_HOPPER: Capability = (9, 0)
_EXPERTS = 512  # that one program of the map looks through
_OFFLOADED = {"expert_fc1", "moe_act", "fused_group_mlp"}


def obstacle(config: TransformerConfig, capability: Capability | None) -> str | None:
    """What of the config or the GPU leaves the experts to Megatron and Transformer Engine; None where nothing does."""
    sizes = (config.moe_latent_size or config.hidden_size, config.moe_ffn_hidden_size or 0)
    plain = config.gated_linear_unit and config.activation_func is F.silu and config.bias_activation_fusion
    found = {
        "measured on Hopper alone": capability != _HOPPER,
        "no grouped products": not config.moe_grouped_gemm,
        "experts on several ranks": (config.expert_model_parallel_size, config.expert_tensor_parallel_size) != (1, 1),
        "a dispatcher other than alltoall": config.moe_token_dispatcher_type != "alltoall",
        "not in 16 bits": config.params_dtype not in (torch.bfloat16, torch.float16),
        "FP8 or FP4": bool(config.fp8 or config.fp4 or config.quant_recipe),
        "gradients apart from their buffer": not config.gradient_accumulation_fusion,
        "biases": bool(config.add_bias_linear),
        "an activation other than SwiGLU": not plain or config.use_te_activation_func,
        "gates between values": config.moe_mlp_glu_interleave_size is not None,
        "weights before the products": config.moe_apply_probs_on_input,
        "dropped or padded tokens": config.moe_expert_capacity_factor is not None
        or config.moe_router_padding_for_quantization,
        "CUDA graphs": config.cuda_graph_impl != "none",
        "delayed gradients": config.delay_wgrad_compute
        or config.overlap_dispatch_backward_with_experts_wgrad
        or config.overlap_moe_expert_parallel_comm,
        "activations on the CPU": config.cpu_offloading
        or (config.fine_grained_activation_offloading and bool(_OFFLOADED & set(config.offload_modules or ()))),
        "other modules of Transformer Engine": config.use_transformer_engine_op_fuser
        or config.moe_single_grouped_weight
        or config.moe_paged_stash,
        "too many experts": (config.num_moe_experts or 0) > _EXPERTS,
        "uneven sizes": any(size % 16 for size in sizes),
    }
    return next((name for name, stands in found.items() if stands), None)


def capability() -> Capability | None:
    """Of the GPU here; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def told(config: TransformerConfig, chunks: Iterable[nn.Module]) -> tuple[bool, str]:
    """Whether experts of the built models have products of their own, and why."""
    if any(getattr(module, "own_products", False) for chunk in chunks for module in chunk.modules()):
        return True, "Triton kernels for all experts of a rank; their tokens are counted on the device alone"
    return False, f"Transformer Engine's: {obstacle(config, capability()) or 'adapted or biased linears'}"
