"""Laws of conversion over random models and layouts, and a hand-written converter that the tables must agree with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mbfn
from mbfn.config.model import ModelConfig, padded_vocab_size
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.table import law, table_of
from mbfn.errors import ConversionError
from tests.strategies import layouts, models, numbered_weights

SINGLE = ParallelConfig()


def all_states(hf: dict[str, Tensor], model: ModelConfig, parallel: ParallelConfig) -> dict[int, dict[str, Tensor]]:
    return {r: dict(mbfn.to_megatron(hf, model, parallel=parallel, rank=r)) for r in range(parallel.world_size)}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hf_to_megatron_to_hf_is_the_identity(data: st.DataObject) -> None:
    model = data.draw(models())
    parallel = data.draw(layouts(model))
    hf = numbered_weights(model)
    assert_same(dict(mbfn.to_hf(all_states(hf, model, parallel), model, parallel=parallel)), hf)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reshard_is_conversion_to_the_new_layout(data: st.DataObject) -> None:
    model = data.draw(models())
    source, target = data.draw(layouts(model)), data.draw(layouts(model))
    rank = data.draw(st.integers(0, target.world_size - 1))
    hf = numbered_weights(model)
    moved = mbfn.reshard(all_states(hf, model, source), model, source=source, target=target, rank=rank)
    assert_same(dict(moved), dict(mbfn.to_megatron(hf, model, parallel=target, rank=rank)))


@settings(max_examples=60, deadline=None)
@given(models())
def test_every_rule_keeps_its_law(model: ModelConfig) -> None:
    """iso: each place holds one weight and no two the same; section: padding is zero and the weights come back."""
    table, hf = table_of(model, SINGLE), numbered_weights(model)
    state = mbfn.to_megatron(hf, model, parallel=SINGLE)
    for tensor in table.tensors.values():
        if tensor.name not in state:
            continue
        values, used = state[tensor.name], {copy.source for copy in tensor.plan.copies}
        weights = torch.cat([hf[name].flatten() for name in sorted(used)])
        found = values[values != 0]
        assert torch.equal(found.sort().values, weights.sort().values), tensor.name
        if law(tensor.rule, table.sizes) == "iso":
            assert values.numel() == weights.numel(), tensor.name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_rank_is_the_slice_of_a_hand_written_conversion(data: st.DataObject) -> None:
    """Round trips cannot see a mistake made both ways; this compares with the formulae written out in torch."""
    model = data.draw(models())
    parallel = data.draw(layouts(model))
    rank = data.draw(st.integers(0, parallel.world_size - 1))
    hf = numbered_weights(model)
    tp = rank % parallel.tp
    state = mbfn.to_megatron(hf, model, parallel=parallel, rank=rank)
    for name, value in state.items():
        whole = by_hand(name, rank, hf, model, parallel)
        assert torch.equal(value, whole if whole.shape == value.shape else cut_by_hand(name, whole, tp, parallel.tp)), (
            name
        )


def by_hand(name: str, rank: int, hf: dict[str, Tensor], model: ModelConfig, parallel: ParallelConfig) -> Tensor:
    """The whole Megatron tensor that `name` of `rank` is cut from."""
    chunk, _, rest = name.partition(".") if name.startswith("model") else ("model0", "", name)
    if rest.startswith("embedding") or (rest.startswith("output_layer") and model.share_embeddings_and_output_weights):
        return padded(hf["model.embed_tokens.weight"], model, parallel)
    if rest.startswith("output_layer"):
        return padded(hf["lm_head.weight"], model, parallel)
    if rest == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    local, tail = rest.removeprefix("decoder.layers.").split(".", 1)
    stage = rank // (parallel.world_size // parallel.pp)
    per_chunk = model.num_layers // (parallel.pp * parallel.vpp)
    layer = (int(chunk.removeprefix("model")) * parallel.pp + stage) * per_chunk + int(local)
    return layer_by_hand(tail, lambda suffix: hf[f"model.layers.{layer}.{suffix}"], model)


def layer_by_hand(tail: str, get: Callable[[str], Tensor], model: ModelConfig) -> Tensor:
    kind = tail.rsplit(".", 1)[1]
    match tail.rsplit(".", 1)[0]:
        case "input_layernorm":
            return get("input_layernorm.weight")
        case "pre_mlp_layernorm":
            return get("post_attention_layernorm.weight")
        case "self_attention.linear_qkv":
            q, k, v = (get(f"self_attn.{x}_proj.{kind}") for x in "qkv")
            groups = [t.reshape(model.num_query_groups, -1, *t.shape[1:]) for t in (q, k, v)]
            return torch.cat(groups, dim=1).flatten(0, 1)
        case "self_attention.linear_proj":
            return get(f"self_attn.o_proj.{kind}")
        case "self_attention.q_layernorm":
            return get("self_attn.q_norm.weight")
        case "self_attention.k_layernorm":
            return get("self_attn.k_norm.weight")
        case "mlp.linear_fc1":
            return torch.cat([get(f"mlp.gate_proj.{kind}"), get(f"mlp.up_proj.{kind}")])
        case "mlp.linear_fc2":
            return get(f"mlp.down_proj.{kind}")
    raise AssertionError(tail)


def cut_by_hand(name: str, whole: Tensor, tp: int, size: int) -> Tensor:
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[tp] for half in whole.chunk(2)])
    row_parallel = "linear_proj.weight" in name or "linear_fc2.weight" in name
    return whole.chunk(size, dim=1 if row_parallel else 0)[tp]


def padded(table: Tensor, model: ModelConfig, parallel: ParallelConfig) -> Tensor:
    rows = padded_vocab_size(model, parallel) - len(table)
    return torch.cat([table, table.new_zeros(rows, table.shape[1])])


@given(models())
@settings(max_examples=60, deadline=None)
def test_config_json_round_trip(model: ModelConfig) -> None:
    readable = dataclasses.replace(model, make_vocab_size_divisible_by=128)
    assert mbfn.model_from_hf(mbfn.model_to_hf(readable)) == readable


@given(models())
@settings(max_examples=60, deadline=None)
def test_parameter_count_is_the_tables(model: ModelConfig) -> None:
    assert model.num_parameters == sum(math.prod(s) for s in table_of(model, SINGLE).hf_shapes.values())


def llama(**changes: object) -> ModelConfig:
    values: dict = dict(
        family="llama", num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
        kv_channels=6, vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})


BAD_WEIGHTS = {
    "missing": (
        lambda hf: hf.pop("model.layers.1.mlp.up_proj.weight"),
        "model.layers.1.mlp.up_proj.weight: missing; the config asks for shape [40, 24]",
    ),
    "extra": (
        lambda hf: hf.update({"model.layers.0.mlp.gate.weight": torch.zeros(2)}),
        "model.layers.0.mlp.gate.weight: no rule of family llama for this name; does config.json describe these "
        "weights?",
    ),
    "transposed": (
        lambda hf: hf.update({"model.layers.0.mlp.down_proj.weight": hf["model.layers.0.mlp.down_proj.weight"].T}),
        "model.layers.0.mlp.down_proj.weight: expected shape [24, 40] by the config, found [40, 24]",
    ),
    "one layer more": (
        lambda hf: hf.update({"model.layers.2.input_layernorm.weight": torch.zeros(24)}),
        "model.layers.2.input_layernorm.weight: no rule of family llama for this name; does config.json describe these "
        "weights?",
    ),
    "no head": (lambda hf: hf.pop("lm_head.weight"), "lm_head.weight: missing; the config asks for shape [50, 24]"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_contradict_the_config(case: str) -> None:
    spoil, message = BAD_WEIGHTS[case]
    hf = numbered_weights(llama())
    spoil(hf)
    with pytest.raises(ConversionError) as caught:
        mbfn.to_megatron(hf, llama(), parallel=SINGLE)
    assert str(caught.value) == message


def test_a_head_beside_tied_embeddings() -> None:
    model = llama(share_embeddings_and_output_weights=True)
    hf = numbered_weights(model) | {"lm_head.weight": torch.zeros(50, 24)}
    with pytest.raises(
        ConversionError, match=r"^lm_head.weight: not expected beside tied embeddings; remove it, or set"
    ):
        mbfn.to_megatron(hf, model, parallel=SINGLE)


def test_parts_of_two_dtypes() -> None:
    hf = numbered_weights(llama(), torch.bfloat16)
    hf["model.layers.0.mlp.up_proj.weight"] = hf["model.layers.0.mlp.up_proj.weight"].float()
    state = mbfn.to_megatron(hf, llama(), parallel=SINGLE)
    with pytest.raises(ConversionError) as caught:
        state["decoder.layers.0.mlp.linear_fc1.weight"]
    assert str(caught.value) == (
        "decoder.layers.0.mlp.linear_fc1.weight: expected parts of one dtype, found "
        "model.layers.0.mlp.gate_proj.weight torch.bfloat16, model.layers.0.mlp.up_proj.weight torch.float32"
    )


def test_ranks_that_do_not_cover_the_weights() -> None:
    parallel = ParallelConfig(tp=2)
    states = all_states(numbered_weights(llama()), llama(), parallel)
    del states[1]
    with pytest.raises(
        ConversionError, match=r"^model.embed_tokens.weight: the given ranks hold 1200 of its 1200|hold"
    ):
        mbfn.to_hf(states, llama(), parallel=parallel)


def test_a_state_of_another_layout() -> None:
    states = all_states(numbered_weights(llama()), llama(), SINGLE)
    with pytest.raises(ConversionError, match=r"rank 0: .*: expected shape"):
        mbfn.to_hf(states, llama(), parallel=ParallelConfig(tp=2))
