"""Qwen1.5/2-MoE and Qwen3-MoE."""

from collections.abc import Mapping
from typing import Any

from mbfn.config.model import ModelConfig
from mbfn.errors import ConversionError
from mbfn.families.experts import experts, mixture, router, shared_experts
from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect, Fields
from mbfn.families.qwen import DEFAULTS
from mbfn.families.rule import Form, Rule
from mbfn.families.windows import KEYS, read_switched, write_switched

FIELDS: Fields = (
    ("num_experts_per_tok", "moe.moe_router_topk"),
    ("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
    ("router_aux_loss_coef", "moe.moe_aux_loss_coeff"),
)
OWN_KEYS = (*KEYS, "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "num_experts", "num_local_experts")


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, the layers without experts, and how scores are normalised."""
    step, without = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    dense = tuple(i for i in range(hf["num_hidden_layers"]) if i in without or (i + 1) % step)
    count = hf.get("num_experts") or hf.get("num_local_experts")  # transformers 5 writes the latter for Qwen3
    if count is None:
        raise ConversionError("config.json: num_experts: missing, and without a default")
    return {
        **read_switched(hf),
        "moe.num_moe_experts": count,
        "moe.dense_layers": dense,
        "moe.moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    """The keys that `read` reads."""
    assert model.moe is not None
    return {
        **write_switched(model),
        "num_experts": model.moe.num_moe_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(model.moe.dense_layers),
        "norm_topk_prob": not model.moe.moe_router_pre_softmax,
    }


def qwen2_moe(model: ModelConfig, form: Form) -> tuple[Rule, ...]:
    """Routed experts, and shared ones behind a gate."""
    return mixture(model, (*router(model), *experts(form), *shared_experts(model, "mlp.shared_expert")))


def qwen3_moe(model: ModelConfig, form: Form) -> tuple[Rule, ...]:
    """Routed experts alone."""
    return mixture(model, (*router(model), *experts(form)))


QWEN2_MOE = Family(
    rules=qwen2_moe,
    dialect=Dialect(
        family="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        fields=(
            *FIELDS,
            ("qkv_bias", "add_qkv_bias"),
            ("shared_expert_intermediate_size", "moe.moe_shared_expert_intermediate_size"),
        ),
        constants={"moe.moe_shared_expert_gate": True},
        defaults={**DEFAULTS, "qkv_bias": True, "router_aux_loss_coef": 0.001},
        own_keys=OWN_KEYS,
        read=read,
        write=write,
    ),
)

QWEN3_MOE = Family(
    rules=qwen3_moe,
    dialect=Dialect(
        family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        fields=(*FIELDS, ("attention_bias", "add_qkv_bias"), ("attention_bias", "add_proj_bias")),
        constants={"qk_layernorm": True},
        defaults={**DEFAULTS, "attention_bias": False, "router_aux_loss_coef": 0.001},
        explicit_head_dim=True,
        own_keys=OWN_KEYS,
        read=read,
        write=write,
    ),
)
