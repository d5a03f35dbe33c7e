"""build() and schema(): laws on random configs, and every message as the user reads it."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mbfn.config import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RopeScaling,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    to_dict,
    to_yaml,
)
from mbfn.config.build import build
from mbfn.config.model import Dtype
from mbfn.config.schema import schema
from mbfn.errors import ConfigError, require

finite = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups, queries, layers = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return ModelConfig(
        family=draw(st.sampled_from(["llama", "qwen2", "1e3", "null", "on", "x: y"])),
        num_layers=layers,
        hidden_size=draw(st.integers(1, 10**9)),
        ffn_hidden_size=draw(st.integers(1, 999)),
        num_attention_heads=groups * queries,
        num_query_groups=groups,
        kv_channels=draw(st.integers(1, 256)),
        vocab_size=draw(st.integers(1, 200_000)),
        max_position_embeddings=10**6,
        rotary_base=draw(finite),
        layernorm_epsilon=draw(finite),
        rope_scaling=RopeScaling(rope_type=draw(st.sampled_from(["default", "linear", "llama3"])), factor=draw(finite)),
        add_qkv_bias=draw(st.booleans()),
        window_size=draw(st.none() | st.integers(1, 99)),
        window_layers=tuple(draw(st.lists(st.integers(0, layers - 1), max_size=3))),
        eos_token_id=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
    )


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    dp, micro = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return RunConfig(
        model=draw(models()),
        parallel=ParallelConfig(dp=dp),
        precision=PrecisionConfig(
            params=draw(st.sampled_from(["bf16", "fp16"])), exp_avg=draw(st.sampled_from(DTYPES))
        ),
        optim=OptimConfig(lr=draw(finite)),
        schedule=ScheduleConfig(decay_steps=draw(st.none() | st.integers(1, 9))),
        train=TrainConfig(global_batch_size=dp * micro * draw(st.integers(1, 4)), micro_batch_size=micro),
    )


@given(runs())
def test_build_inverts_to_dict_and_yaml(config: RunConfig) -> None:
    assert build(RunConfig, to_dict(config)) == config
    assert build(RunConfig, yaml.safe_load(to_yaml(config))) == config


@given(runs())
def test_a_run_is_hashable_and_survives_pickling(config: RunConfig) -> None:
    twin = pickle.loads(pickle.dumps(config))
    assert (twin, hash(twin), twin.digest) == (config, hash(config), config.digest)


@given(runs(), st.integers(1, 10**6))
def test_configs_cannot_be_changed(config: RunConfig, steps: int) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = steps  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        config.model.invented = steps  # type: ignore[attr-defined]


@given(models())
def test_the_schema_holds_exactly_the_defaults(model: ModelConfig) -> None:
    tree = schema(RunConfig)
    assert tree["model"]["num_layers"] == "???"
    tree["model"] = to_dict(model)
    assert build(RunConfig, tree) == RunConfig(model=model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    kind: Literal["plain"] = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    kind: Literal["ranked"] = "ranked"
    rank: int = 8
    alpha: float

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.rank >= 1, "rank", f"expected at least 1, got {self.rank}", problems)
        require(self.alpha > 0, "alpha", f"expected above 0, got {self.alpha}", problems)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    name: str
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: tuple[int, ...] = ()
    mode: Literal["fast", "exact", 3] = "fast"
    limit: int | None = None
    either: int | str = 1
    peft: Plain | Ranked = Plain()
    maybe: Ranked | None = None
    flag: bool = False


def test_every_kind_of_annotation() -> None:
    tree = {
        "name": "n",
        "betas": [1, 0.5],
        "sizes": [1, 2, 3],
        "mode": 3,
        "limit": 4,
        "either": "x",
        "peft": {"kind": "ranked", "alpha": 2},
        "maybe": {"alpha": 1.5, "rank": 1},
        "flag": True,
    }
    built = build(Root, tree)
    assert built == Root(
        name="n",
        betas=(1.0, 0.5),
        sizes=(1, 2, 3),
        mode=3,
        limit=4,
        either="x",
        peft=Ranked(alpha=2.0),
        maybe=Ranked(alpha=1.5, rank=1),
        flag=True,
    )
    assert type(built.betas[0]) is float
    assert build(Root, to_dict(built)) == built


def test_an_empty_union_is_the_default() -> None:
    assert schema(Root)["peft"] == {}
    assert build(Root, {"name": "n", "peft": {}}) == Root(name="n")


MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({}, "name: is required and has no value; give name=..."),
    ({"name": "???"}, "name: is required and has no value; give name=..."),
    ({"name": 3}, "name: expected text, got 3; quote it: 'name=\"3\"'"),
    ({"name": None}, "name: expected text, got null"),
    ({"name": "n", "nam": 1}, "nam: no such field; did you mean 'name'?"),
    (
        {"name": "n", "zzz": 1},
        "zzz: no such field; choose among betas, either, flag, limit, maybe, mode, name, peft, sizes",
    ),
    ({"name": "n", "betas": [1]}, "betas: expected 2 values, got 1: [1]"),
    ({"name": "n", "betas": 0.9}, "betas: expected a list, got 0.9; write betas=[0.9]"),
    ({"name": "n", "betas": [0.9, "x"]}, "betas[1]: expected a number, got 'x'"),
    ({"name": "n", "sizes": [1, True]}, "sizes[1]: expected an integer, got True"),
    ({"name": "n", "mode": "fats"}, "mode: expected one of fast, exact, 3, got 'fats'; did you mean 'fast'?"),
    ({"name": "n", "mode": "zzz"}, "mode: expected one of fast, exact, 3, got 'zzz'"),
    ({"name": "n", "limit": "x"}, "limit: expected an integer, got 'x'"),
    ({"name": "n", "limit": 1e3}, "limit: expected an integer, got 1000.0; write limit=1000"),
    ({"name": "n", "either": 1.5}, "either: expected an integer or text, got 1.5"),
    ({"name": "n", "either": None}, "either: expected an integer or text, got null"),
    ({"name": "n", "flag": 1}, "flag: expected true or false, got 1"),
    (
        {"name": "n", "peft": {"kind": "rankd"}},
        "peft.kind: expected one of plain, ranked, got 'rankd'; did you mean 'ranked'?",
    ),
    (
        {"name": "n", "peft": {"kind": "ranked", "alpha": 1, "rnk": 2}},
        "peft.rnk: no such field; did you mean 'peft.rank'?",
    ),
    ({"name": "n", "peft": "x"}, "peft: expected the fields of Plain or the fields of Ranked, got 'x'"),
    ({"name": "n", "maybe": 3}, "maybe: expected the fields of Ranked, got 3"),
    ({"name": "n", "maybe": {}}, "maybe.alpha: is required and has no value; give maybe.alpha=..."),
    (
        {"name": 1, "maybe": {"alpha": -1, "rank": 0}, "flag": "yes"},
        "name: expected text, got 1; quote it: 'name=\"1\"'\n"
        "maybe.rank: expected at least 1, got 0\n"
        "maybe.alpha: expected above 0, got -1.0\n"
        "flag: expected true or false, got 'yes'",
    ),
]


@pytest.mark.parametrize(("tree", "message"), MESSAGES)
def test_messages(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Root, tree)
    assert str(caught.value) == message


def test_errors_across_groups_come_together() -> None:
    tree = schema(RunConfig) | {"model": to_dict(MODEL), "parallel": {"tp": 3, "cp": 2}}
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, tree)
    assert str(caught.value) == (
        "parallel.tp: num_attention_heads=8 does not divide by tp=3: choose among [1, 2, 4, 8]\n"
        "parallel.tp: tp=3 is neither a divisor nor a multiple of num_query_groups=4\n"
        "parallel.tp: ffn_hidden_size=704 does not divide by tp=3: choose among [1, 2, 4, 8, 16, 32, 64]"
    )


MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=2048,
    max_position_embeddings=1024,
)
