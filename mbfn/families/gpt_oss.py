"""GPT-OSS: sinks, alternate windows, biased experts stacked in one tensor with gate and up in turn."""

from mbfn.config.model import ModelConfig
from mbfn.families.experts import mixture, router, stacked_down, stacked_gate_up
from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect
from mbfn.families.layout import Cat, Dim
from mbfn.families.rule import Form, Rule
from mbfn.families.windows import read_typed, write_typed


def gpt_oss(model: ModelConfig, form: Form) -> tuple[Rule, ...]:
    """Inputs lead in the experts' matrices: (hidden, gate and up in turn), (moe_ffn, hidden)."""
    del form
    both: Dim = ("moe_ffn", Cat(gate=(), up=()))
    stacked = (
        stacked_gate_up("", ("hidden", both), "weight"),
        stacked_gate_up("_bias", (both,), "bias"),
        stacked_down("", ("moe_ffn", "hidden"), "weight"),
        stacked_down("_bias", ("hidden",), "bias"),
    )
    return mixture(model, (*router(model, "mlp.router"), *stacked))


GPT_OSS = Family(
    rules=gpt_oss,
    dialect=Dialect(
        family="gpt_oss",
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        fields=(
            ("num_local_experts", "moe.num_moe_experts"),
            ("num_experts_per_tok", "moe.moe_router_topk"),
            ("intermediate_size", "moe.moe_ffn_hidden_size"),
            ("router_aux_loss_coef", "moe.moe_aux_loss_coeff"),
            ("attention_bias", "add_qkv_bias"),
            ("attention_bias", "add_proj_bias"),
        ),
        constants={
            "moe.add_router_bias": True,
            "moe.add_expert_bias": True,
            "attention_sinks": True,
            "activation": "swiglu_oai",
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "router_aux_loss_coef": 0.001,
            "head_dim": 64,
        },
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        explicit_head_dim=True,
        own_keys=("layer_types", "sliding_window", "experts_per_token", "initial_context_length"),
        read=read_typed,
        write=write_typed,
    ),
)
