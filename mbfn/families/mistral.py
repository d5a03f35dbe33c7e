"""Mistral's dense models."""

from mbfn.families.decoder import dense
from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect

MISTRAL = Family(
    rules=dense,
    dialect=Dialect(
        family="mistral",
        architecture="MistralForCausalLM",
        model_type="mistral",
        defaults={"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False},
        read_window=lambda hf: (hf.get("sliding_window"), ()),
        write_window=lambda model: {"sliding_window": model.window_size},
    ),
)
