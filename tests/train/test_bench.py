"""bench=true: the record of a measured run, the split of a step, what the ranks are fed, and the choices it names."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mbfn import to_megatron
from mbfn.config.bench import BenchmarkConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.peft import PeftConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.recipes import attention_environment
from mbfn.config.run import RunConfig
from mbfn.convert.table import table_of
from mbfn.megatron import World
from mbfn.megatron.precision import precision_settings
from mbfn.megatron.weights import RandomWeights
from mbfn.plan.flops import step_tokens
from mbfn.train.bench import random_batches
from mbfn.train.job import Job, run_job
from mbfn.train.timesplit import GAPS, Span, split
from tests.train.sessions import MODEL, session_run


def bench_run(**benchmark: object) -> RunConfig:
    plain = session_run(ParallelConfig(), steps=10)
    train = replace(plain.train, micro_batch_size=1, global_batch_size=2, seq_length=128)
    timed = BenchmarkConfig(**{"warmup_steps": 1, "steps": 2, **benchmark})  # type: ignore[arg-type]
    return replace(plain, train=train, bench=True, benchmark=timed)


@pytest.mark.parametrize("kind", ["plain", "packed_lora"])
def test_a_benchmark_leaves_a_line_that_agrees_with_itself(kind: str, tmp_path: Path) -> None:
    run = bench_run(packed_samples=2 if kind == "packed_lora" else 0)
    run = replace(run, peft=PeftConfig(kind="lora", rank=4)) if kind == "packed_lora" else run
    assert run_job(Job(run=run, output_dir=tmp_path, command=("mbfn.train", "bench=true")), lambda: 0) == 0
    (line,) = (tmp_path / "bench.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["overrides"] == ["bench=true"]
    assert len(record["times_ms"]) == 2
    assert record["tokens_per_s"] == pytest.approx(1000 * step_tokens(run) / record["step_ms"], rel=1e-3)
    assert record["tflops_full"] >= record["tflops_causal"]
    assert sum(record["split_ms"].values()) >= 0.99 * record["profiled_ms"]  # operators of two threads may overlap
    assert 0 <= record["loop_overhead"] < 1
    first, last = record["losses"]
    assert first == pytest.approx(math.log(MODEL.vocab_size), rel=0.05)
    assert last == pytest.approx(first, rel=0.1)  # new tokens at every step: nothing to learn
    assert record["startup_s"]["first_step"] >= record["startup_s"]["built"] >= record["startup_s"]["opened"] > 0
    resolved = json.loads((tmp_path / "resolved.json").read_text())
    assert {name: choice["value"] for name, choice in resolved.items()} == record["choices"]
    assert resolved["modules"]["value"] == "torch"
    assert resolved["overlap grad reduce"]["reason"] == "one data-parallel rank has nothing to send"
    assert all(choice["reason"] for choice in resolved.values())
    assert not (tmp_path / "checkpoints").exists()


def test_kinds_and_gaps_of_a_step_add_up() -> None:
    spans = [
        Span(name="nvjet_sm90_tst_256x128", start=0.0, end=4.0),
        Span(name="cudnn_generated_fort_native_sdpa_sm90_flash_bprop", start=4.5, end=7.0),
        Span(name="cast_transpose_optimized_kernel", start=7.0, end=7.5),
        Span(name="multi_tensor_apply_kernel<adam::AdamFunctor>", start=8.0, end=9.0),
    ]
    found = split(spans, 10.0)
    assert found.kinds == {"gemm": 4.0, "attention": 2.5, "optimizer": 1.0, "cast": 0.5, GAPS: 2.0}
    both = split([*spans, Span(name="ncclDevKernel_AllGather", start=3.0, end=5.0)], 10.0)
    assert both.kinds["communication"] == 2.0
    assert both.kinds[GAPS] == 1.5  # what runs beside other work fills only the gap
    own = [Span(name=name, start=at, end=at + 1) for at, name in enumerate(("_product", "_add_gradient", "_adamw"))]
    assert split([*own, Span(name="_swiglu_back", start=3, end=4)], 4.0).kinds == {
        "gemm": 2.0, "optimizer": 1.0, "activation": 1.0, GAPS: 0.0,
    }  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 8), step=st.integers(0, 5))
def test_packed_rows_hold_that_many_samples(samples: int, step: int) -> None:
    train = replace(bench_run().train, seq_length=512)
    model = replace(MODEL, max_position_embeddings=512)
    run = replace(bench_run(), model=model, train=train, benchmark=BenchmarkConfig(packed_samples=samples))
    ((first, second),) = random_batches(run, _place(run, 0), step, step + 1)
    for batch in (first, second):
        bounds = batch["cu_seqlens"].tolist()
        assert (bounds[0], bounds[-1], len(bounds)) == (0, 512, samples + 1)
        assert all(b > a and a % 64 == 0 for a, b in itertools.pairwise(bounds))
        restarts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        assert restarts == bounds[:-1]
    assert not torch.equal(first["tokens"], second["tokens"])


def test_ranks_that_share_a_batch_get_the_same_tokens() -> None:
    run = replace(bench_run(), parallel=ParallelConfig(tp=2, dp=2))
    places = [_place(run, rank) for rank in range(4)]
    tokens = [next(random_batches(run, place, 3, 4))[0]["tokens"] for place in places]
    for a, b in itertools.combinations(range(4), 2):
        same = places[a].coordinates.dp == places[b].coordinates.dp
        assert torch.equal(tokens[a], tokens[b]) == same


def _place(run: RunConfig, rank: int) -> World:
    return World(rank=rank, device=torch.device("cpu"), parallel=run.parallel, groups=ProcessGroupCollection())


class Unreadable(Mapping[str, Tensor]):
    """Names and shapes of weights that nobody may ask for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def meta(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def test_planning_weights_makes_none_of_them() -> None:
    shapes = table_of(MODEL, ParallelConfig()).hf_shapes
    planned = to_megatron(Unreadable(shapes), MODEL, parallel=ParallelConfig())
    assert "output_layer.weight" in planned
    with pytest.raises(AssertionError, match="was read"):
        planned["output_layer.weight"]


def test_names_of_random_weights_make_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = RandomWeights(MODEL, table_of(MODEL, ParallelConfig()).hf_shapes, 1)
    monkeypatch.delattr(RandomWeights, "__getitem__")
    assert "lm_head.weight" in made
    assert "lm_head.bias" not in made


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"params": "bf16"}, {}),
        ({"params": "bf16", "fp8": "tensorwise"}, {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        ({"params": "bf16", "fp8": "blockwise"}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ({"params": "bf16", "fp8": "mxfp8"}, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
        (
            {"params": "bf16", "fp8": "delayed", "fp8_attention": "dot_product"},
            {
                "fp8_amax_history_len": 16,
                "fp8_amax_compute_algo": "max",
                "fp8_dot_product_attention": True,
            },
        ),
        (
            {"params": "bf16", "fp8": "nvfp4", "num_layers_at_end_in_bf16": 2},
            {"fp4": "e2m1", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0},
        ),
        ({"params": "bf16", "fp8": "tensorwise", "fp8_param_gather": True}, {"fp8_param": True}),
    ],
)
def test_recipes_in_the_terms_of_megatron(fields: dict[str, Any], expected: dict[str, object]) -> None:
    found = precision_settings(PrecisionConfig(**fields))
    assert {name: found[name] for name in expected} == expected
    assert bool(found) == bool(expected)


def test_attention_takes_scales_of_earlier_steps_where_the_gpu_has_no_others() -> None:
    precision = PrecisionConfig(params="bf16", fp8="tensorwise", fp8_attention="dot_product")
    assert attention_environment(precision, (9, 0))["NVTE_DPA_FP8_RECIPE"] == "DelayedScaling"
    assert attention_environment(precision, (10, 0)) == {}
    assert attention_environment(replace(precision, fp8="delayed"), (9, 0)) == {}
    assert attention_environment(replace(precision, fp8_attention="none"), (9, 0)) == {}
