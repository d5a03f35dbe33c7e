"""`config.json` <-> ModelConfig: one table of fields read both ways, and no key that changes the mathematics unread.

transformers 5 writes `rope_parameters`, earlier files `rope_theta` and `rope_scaling`; both are read, the earlier form
is written because both read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, cast

from mbfn.config.model import Dtype, ModelConfig, RopeScaling
from mbfn.errors import ConversionError

Kind = Literal["default", "linear", "llama3"]
type Window = tuple[int | None, tuple[int, ...]]  # ModelConfig's window_size and window_layers

SHARED: tuple[tuple[str, str], ...] = (  # (config.json, ModelConfig)
    ("num_hidden_layers", "num_layers"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_hidden_size"),
    ("num_attention_heads", "num_attention_heads"),
    ("vocab_size", "vocab_size"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("rms_norm_eps", "layernorm_epsilon"),
    ("initializer_range", "init_method_std"),
    ("tie_word_embeddings", "share_embeddings_and_output_weights"),
    ("bos_token_id", "bos_token_id"),
    ("pad_token_id", "pad_token_id"),
)

READ_APART = frozenset(  # keys that more than one field, or a dialect, is made of
    """architectures dtype torch_dtype model_type head_dim num_key_value_heads eos_token_id rope_theta rope_scaling
    rope_parameters layer_types sliding_window use_sliding_window max_window_layers""".split()
)

INERT = frozenset(  # keys that do not change what the network computes in training
    """_name_or_path auto_map attn_implementation chunk_size_feed_forward id2label is_encoder_decoder label2id
    name_or_path output_attentions output_hidden_states pretraining_tp problem_type return_dict transformers_version
    use_cache use_mrope""".split()
)

FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "is_decoder": (True, False),
}

DTYPES: Mapping[str, Dtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What one family's `config.json` says in its own way."""

    family: str
    architecture: str
    model_type: str
    fields: tuple[tuple[str, str], ...] = ()  # further (config.json, ModelConfig) pairs
    constants: Mapping[str, Any] = MappingProxyType({})  # ModelConfig fields that the architecture settles
    defaults: Mapping[str, Any] = MappingProxyType({})  # of keys that files leave out, as the config class has them
    explicit_head_dim: bool = False  # head_dim is a field of its own, not hidden_size / heads
    read_window: Callable[[Mapping[str, Any]], Window] = lambda hf: (None, ())
    write_window: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}


def read_config(hf: Mapping[str, Any], dialect: Dialect) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises: ConversionError naming the first key that is missing, unknown, or has a value that is not supported.
    """
    fields = (*SHARED, *dialect.fields)
    _refuse_unknown(hf, {key for key, _ in fields} | dialect.defaults.keys(), dialect)
    known: dict[str, Any] = {**dialect.defaults, **{key: value for key, value in hf.items() if value is not None}}
    values: dict[str, Any] = {
        field: known.get(key) if field.endswith("token_id") else _need(known, key) for key, field in fields
    }
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    window_size, window_layers = dialect.read_window(known)
    return ModelConfig(
        **values,
        **dialect.constants,
        family=dialect.family,
        num_query_groups=known.get("num_key_value_heads", heads),
        kv_channels=known.get("head_dim") or hidden // heads,
        rotary_base=float(_rope(known).get("rope_theta", known.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(known),
        window_size=window_size,
        window_layers=window_layers,
        params_dtype=DTYPES[str(hf.get("torch_dtype") or hf.get("dtype") or "bfloat16").removeprefix("torch.")],
        eos_token_id=_as_tuple(known.get("eos_token_id")),
    )


def write_config(model: ModelConfig, dialect: Dialect) -> dict[str, Any]:
    """The `config.json` of `model`: what `read_config` reads back as the same value."""
    config: dict[str, Any] = {key: getattr(model, field) for key, field in (*SHARED, *dialect.fields)}
    scaling = model.rope_scaling
    config.update(
        architectures=[dialect.architecture],
        model_type=dialect.model_type,
        num_key_value_heads=model.num_query_groups,
        hidden_act="silu",
        attention_dropout=0.0,
        rope_theta=model.rotary_base,
        rope_scaling=_written_scaling(scaling),
        eos_token_id=model.eos_token_id[0] if len(model.eos_token_id) == 1 else list(model.eos_token_id) or None,
        torch_dtype=next(name for name, dtype in DTYPES.items() if dtype == model.params_dtype),
        use_cache=True,
        **dialect.write_window(model),
    )
    if dialect.explicit_head_dim or model.kv_channels * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.kv_channels
    return dict(sorted(config.items()))


def _refuse_unknown(hf: Mapping[str, Any], known: set[str], dialect: Dialect) -> None:
    for key, allowed in FIXED.items():
        if key in hf and hf[key] not in allowed:
            raise ConversionError(
                f"config.json: {key}: expected {allowed[0]!r}, found {hf[key]!r}, which is not supported"
            )
    for key in hf.keys() - known - READ_APART - INERT - FIXED.keys():
        raise ConversionError(
            f"config.json: {key}={hf[key]!r}: unknown key for {dialect.architecture}; remove it if it does not change "
            f"what the model computes"
        )


def _need(known: Mapping[str, Any], key: str) -> Any:
    if key not in known:
        raise ConversionError(f"config.json: {key}: missing, and without a default")
    return known[key]


def _rope(known: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], known.get("rope_parameters") or known.get("rope_scaling") or {})


def _rope_scaling(known: Mapping[str, Any]) -> RopeScaling:
    rope = _rope(known)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ConversionError(f"config.json: rope_type: expected default, linear or llama3, found {kind!r}")
    if kind == "default":
        return RopeScaling()
    scaling = RopeScaling(rope_type=cast(Kind, kind), factor=float(rope["factor"]))
    if kind == "linear":
        return scaling
    return replace(
        scaling,
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _written_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.rope_type == "default":
        return None
    written: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "llama3":
        written |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return written


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
