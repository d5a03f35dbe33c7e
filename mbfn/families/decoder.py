"""Rules that decoder families share: the Llama layout of names, cut into the blocks that families differ in."""

from __future__ import annotations

from mbfn.config.model import ModelConfig
from mbfn.families.layout import Cat, Layout, Pad
from mbfn.families.rule import HfTensor, Rule

HF, MC = "model.layers.{i}.", "decoder.layers.{i}."


def axis_sizes(model: ModelConfig, padded_vocab: int) -> dict[str, int]:
    """The length of every axis that the rules name."""
    return {
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "group": model.num_query_groups,
        "rep": model.num_attention_heads // model.num_query_groups,  # query heads of a group
        "head_dim": model.kv_channels,
        "vocab": model.vocab_size,
        "padded_vocab": padded_vocab,
    }


def same(mc: str, hf: str, layout: Layout, *, te: str = "", cut: int | None = None) -> Rule:
    """One tensor on both sides, in one layout."""
    return Rule(
        mc=MC + mc, te=MC + te if te else "", layout=layout, cut=cut, hf=(HfTensor(name=HF + hf, layout=layout),)
    )


def embeddings(model: ModelConfig) -> tuple[Rule, ...]:
    """The word embedding, the last norm, and the output layer or its tied copy on the last pipeline stage."""
    table, padded = ("vocab", "hidden"), (Pad("vocab", "padded_vocab"), "hidden")
    tied = model.share_embeddings_and_output_weights
    embedding, output = "embedding.word_embeddings.weight", "output_layer.weight"
    words = (HfTensor(name="model.embed_tokens.weight", layout=table),)
    head = words if tied else (HfTensor(name="lm_head.weight", layout=table),)
    norm = (HfTensor(name="model.norm.weight", layout=("hidden",)),)
    return (
        Rule(mc=embedding, layout=padded, cut=0, stage="first", hf=words),
        Rule(mc="decoder.final_layernorm.weight", layout=("hidden",), stage="last", hf=norm),
        Rule(mc=output, layout=padded, cut=0, stage="last", tied=embedding if tied else "", hf=head),
    )


def layer_norms() -> tuple[Rule, ...]:
    """The norms before attention and before the MLP; Transformer Engine keeps them in the linear that follows."""
    return (
        same(
            "input_layernorm.weight",
            "input_layernorm.weight",
            ("hidden",),
            te="self_attention.linear_qkv.layer_norm_weight",
        ),
        same(
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            ("hidden",),
            te="mlp.linear_fc1.layer_norm_weight",
        ),
    )


def attention(model: ModelConfig) -> tuple[Rule, ...]:
    """Grouped-query attention with the biases and the per-head norms that the model has."""
    rules = [
        qkv("weight", "hidden"),
        same(
            "self_attention.linear_proj.weight",
            "self_attn.o_proj.weight",
            ("hidden", ("group", "rep", "head_dim")),
            cut=1,
        ),
    ]
    if model.add_qkv_bias:
        rules.append(qkv("bias"))
    if model.add_proj_bias:
        rules.append(same("self_attention.linear_proj.bias", "self_attn.o_proj.bias", ("hidden",)))
    if model.qk_layernorm:
        rules += [
            same(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", ("head_dim",)) for x in "qk"
        ]
    return tuple(rules)


def qkv(kind: str, *inner: str) -> Rule:
    """The three projections interleaved by query group: `[q.. k v | q.. k v | ...]`."""
    heads: Layout = ("group", Cat(q=("rep", "head_dim"), k="head_dim", v="head_dim"))
    queries: Layout = ("group", "rep", "head_dim")
    keys: Layout = ("group", "head_dim")
    return Rule(
        mc=f"{MC}self_attention.linear_qkv.{kind}",
        layout=(heads, *inner),
        cut=0,
        hf=tuple(
            HfTensor(label=x, name=f"{HF}self_attn.{x}_proj.{kind}", layout=(queries if x == "q" else keys, *inner))
            for x in "qkv"
        ),
    )


def gated_mlp(model: ModelConfig) -> tuple[Rule, ...]:
    """SwiGLU: gate and up are the two halves of `linear_fc1`, each cut over tp."""
    rules = [
        gate_up("weight", "hidden"),
        same("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), cut=1),
    ]
    if model.add_mlp_bias:
        rules += [gate_up("bias"), same("mlp.linear_fc2.bias", "mlp.down_proj.bias", ("hidden",))]
    return tuple(rules)


def gate_up(kind: str, *inner: str) -> Rule:
    """Gate rows, then up rows."""
    return Rule(
        mc=f"{MC}mlp.linear_fc1.{kind}",
        layout=(Cat(gate="ffn", up="ffn"), *inner),
        cut=0,
        hf=tuple(HfTensor(label=x, name=f"{HF}mlp.{x}_proj.{kind}", layout=("ffn", *inner)) for x in ("gate", "up")),
    )


def dense(model: ModelConfig) -> tuple[Rule, ...]:
    """A dense decoder with Llama's names."""
    return (*embeddings(model), *layer_norms(), *attention(model), *gated_mlp(model))
