"""Which runs update their weights in one pass, and how long a pass through a model is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mbfn import megatron
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.megatron.adam import updates_in_one_pass
from mbfn.megatron.forward import length_multiple
from tests.megatron.dense import dense_model
from tests.megatron.tiny import FP32, config_of, run_config

LEAN = {"params": "bf16", "grads": "bf16", "exp_avg": "bf16", "exp_avg_sq": "bf16"}


@pytest.mark.parametrize(
    ("precision", "optim", "sharding", "taken"),
    [
        (LEAN, {}, "zero1", True),
        ({"params": "bf16"}, {}, "none", True),
        ({"params": "fp16"}, {}, "zero1", True),
        ({"params": "bf16", "exp_avg": "fp16"}, {}, "zero1", False),
        ({"params": "bf16", "main_params": "fp16"}, {}, "zero1", False),
        ({"params": "bf16", "fp8": "delayed", "fp8_param_gather": True}, {}, "zero1", False),
        ({"params": "bf16"}, {"optimizer": "sgd"}, "none", False),
        ({"params": "bf16"}, {"optimizer_offload_fraction": 0.5}, "zero1", False),
        ({"params": "bf16"}, {}, "fsdp2", False),
    ],
)
def test_one_pass_takes_what_its_kernel_reads(
    precision: dict[str, Any], optim: dict[str, Any], sharding: Any, taken: bool
) -> None:
    run = run_config(config_of(dense_model("arcee")), ParallelConfig(sharding=sharding), PrecisionConfig(**precision))
    run = replace(run, optim=replace(run.optim, **optim))
    assert updates_in_one_pass(run, "te") == taken
    assert not updates_in_one_pass(run, "local")


def test_text_is_not_filled_up_to_a_length_that_turns_at_other_frequencies() -> None:
    gpu = torch.device("cuda")
    model = config_of(dense_model("phi4_mini_short"))  # other frequencies past 32 tokens
    with megatron.open_world(ParallelConfig(), device="cpu", timeout_s=60) as world:
        (chunk,) = megatron.build_model(run_config(model, ParallelConfig(), FP32), world, None)
        on_gpu = replace(world, device=gpu)
        assert [length_multiple(on_gpu, chunk, 2, text) for text in (7, 32, 33, 200)] == [2, 2, 64, 64]
        assert length_multiple(world, chunk, 2, 33) == 2
