"""OLMoE: queries and keys normed over all heads together."""

from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect
from mbfn.families.qwen_moe import qwen3_moe

OLMOE = Family(
    rules=qwen3_moe,
    dialect=Dialect(
        family="olmoe",
        architecture="OlmoeForCausalLM",
        model_type="olmoe",
        fields=(
            ("num_experts", "moe.num_moe_experts"),
            ("num_experts_per_tok", "moe.moe_router_topk"),
            ("intermediate_size", "moe.moe_ffn_hidden_size"),
            ("router_aux_loss_coef", "moe.moe_aux_loss_coeff"),
            ("attention_bias", "add_qkv_bias"),
            ("attention_bias", "add_proj_bias"),
        ),
        constants={"qk_layernorm": True, "qk_layernorm_full": True},
        defaults={
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "router_aux_loss_coef": 0.01,
        },
        fixed={"clip_qkv": None},
        own_keys=("norm_topk_prob",),
        read=lambda hf: {"moe.moe_router_pre_softmax": not hf.get("norm_topk_prob", False)},
        write=lambda model: {"norm_topk_prob": model.moe is not None and not model.moe.moe_router_pre_softmax},
    ),
)
