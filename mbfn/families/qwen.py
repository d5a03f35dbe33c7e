"""Qwen2, Qwen2.5 and Qwen3, dense."""

from mbfn.families.decoder import dense
from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect
from mbfn.families.windows import KEYS, read_switched, write_switched

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}

QWEN2 = Family(
    rules=dense,
    dialect=Dialect(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        constants={"add_qkv_bias": True},
        defaults=DEFAULTS,
        own_keys=KEYS,
        read=read_switched,
        write=write_switched,
    ),
)

QWEN3 = Family(
    rules=dense,
    dialect=Dialect(
        family="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        fields=(("attention_bias", "add_qkv_bias"), ("attention_bias", "add_proj_bias")),
        constants={"qk_layernorm": True},
        defaults={**DEFAULTS, "attention_bias": False, "head_dim": 128},
        explicit_head_dim=True,
        own_keys=KEYS,
        read=read_switched,
        write=write_switched,
    ),
)
