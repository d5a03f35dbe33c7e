"""Parameters are exact: against the published counts, and against Megatron's own models on the meta device."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbfn.config.compose import compose
from mbfn.config.groups import conf_dir
from mbfn.config.model import padded_vocab_size
from mbfn.config.parallel import ParallelConfig, coordinates
from mbfn.megatron import meta_states
from mbfn.plan.weights import stage_weights
from tests.strategies import layouts, models

SIZES = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
_405B = compose("model=llama31_405b", "parallel=tp8pp16vpp4", "train.global_batch_size=64").parallel


@pytest.mark.parametrize("name", SIZES)
def test_one_rank_holds_the_published_parameters(name: str) -> None:
    model, alone = compose(f"model={name}").model, ParallelConfig()
    tables = 1 if model.share_embeddings_and_output_weights else 2
    padding = tables * (padded_vocab_size(model, alone) - model.vocab_size) * model.hidden_size
    (stage,) = stage_weights(model, alone)
    assert stage.held.parameters == model.num_parameters + padding


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("llama31_8b", ParallelConfig(tp=2, pp=2)),
        ("llama32_1b", ParallelConfig(tp=2, pp=4, vpp=2)),  # tied: the last stage has a copy
        ("qwen25_7b", ParallelConfig(tp=4)),  # biases
        ("qwen3_4b", ParallelConfig(pp=3)),  # norms of queries and keys
        ("llama31_405b", _405B),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_stage_is_megatrons(name: str, parallel: ParallelConfig) -> None:
    model = compose(f"model={name}").model
    stages = stage_weights(model, parallel)
    firsts = [place * parallel.world_size // parallel.pp for place in range(parallel.pp)]
    for rank, state in meta_states(model, parallel, firsts):
        assert (
            sum(math.prod(shape) for shape, _ in state.values())
            == stages[coordinates(parallel, rank).pp].held.parameters
        )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_model_at_any_layout_is_megatrons(data: st.DataObject) -> None:
    model = data.draw(models())
    parallel = data.draw(layouts(model))
    rank = data.draw(st.integers(0, parallel.world_size - 1))
    ((_, state),) = meta_states(model, parallel, [rank])
    stage = stage_weights(model, parallel)[coordinates(parallel, rank).pp]
    assert sum(math.prod(shape) for shape, _ in state.values()) == stage.held.parameters
