"""Qwen2, Qwen2.5 and Qwen3 dense models."""

from collections.abc import Mapping
from typing import Any

from mbfn.config.model import ModelConfig
from mbfn.errors import ConversionError
from mbfn.families.decoder import dense
from mbfn.families.family import Family
from mbfn.families.hf_config import Dialect, Window

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}


def read_window(hf: Mapping[str, Any]) -> Window:
    """The first `max_window_layers` layers see the whole past, the others `sliding_window` tokens of it."""
    if not hf.get("use_sliding_window"):
        return None, ()
    layers, kinds = hf["num_hidden_layers"], hf.get("layer_types")
    if kinds is None:
        windowed = tuple(range(hf["max_window_layers"], layers))
    else:
        windowed = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return (hf["sliding_window"], windowed) if windowed else (None, ())


def write_window(model: ModelConfig) -> dict[str, Any]:
    """The same in config.json."""
    if model.window_size is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.num_layers}
    layers = model.window_layers or tuple(range(model.num_layers))
    if layers != tuple(range(layers[0], model.num_layers)):
        raise ConversionError(f"window_layers: expected the last layers of the model, found {list(layers)}")
    return {"use_sliding_window": True, "sliding_window": model.window_size, "max_window_layers": layers[0]}


QWEN2 = Family(
    rules=dense,
    dialect=Dialect(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        constants={"add_qkv_bias": True},
        defaults=DEFAULTS,
        read_window=read_window,
        write_window=write_window,
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
        read_window=read_window,
        write_window=write_window,
    ),
)
