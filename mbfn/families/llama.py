"""Llama 1 to 3.3 and models of its shape."""

from mbfn.families.decoder import dense
from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect

LLAMA = Family(
    rules=dense,
    dialect=Dialect(
        family="llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        fields=(("attention_bias", "add_qkv_bias"), ("attention_bias", "add_proj_bias"), ("mlp_bias", "add_mlp_bias")),
        defaults={
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
        },
    ),
)
