"""Train a small model on one GPU in every number format, and hold its losses against those of fp32.

    python tests/bench/precisions.py [steps=200] [only=bf16,tensorwise] [out=precisions.jsonl]

The tokens are a Markov chain of four successors each, so that there is something to learn and a loss to end at. A
format passes when the mean loss of the last twentieth is within its tolerance of fp32's. One line each; exit 1 for a
failure.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mbfn import megatron
from mbfn.config import ModelConfig, OptimConfig, PrecisionConfig, RunConfig, TrainConfig
from mbfn.errors import MbfnError
from mbfn.megatron import World

_LEAN = {"grads": "bf16", "exp_avg": "bf16", "exp_avg_sq": "bf16"}
_FP8 = {"params": "bf16"}
FORMATS: Mapping[str, tuple[dict[str, object], float]] = {
    "fp32": ({}, 0.0),
    "bf16": ({"params": "bf16"}, 0.01),
    "bf16_lean": ({"params": "bf16", **_LEAN}, 0.02),
    "auto": ({**_FP8, "fp8": "auto"}, 0.03),
    "tensorwise": ({**_FP8, "fp8": "tensorwise"}, 0.03),
    "tensorwise_lean": ({**_FP8, **_LEAN, "fp8": "tensorwise"}, 0.03),
    "delayed": ({**_FP8, "fp8": "delayed"}, 0.03),
    "blockwise": ({**_FP8, "fp8": "blockwise"}, 0.03),
    "tensorwise_attention": ({**_FP8, "fp8": "tensorwise", "fp8_attention": "dot_product"}, 0.05),
    "delayed_attention": ({**_FP8, "fp8": "delayed", "fp8_attention": "dot_product"}, 0.05),
    "tensorwise_output": ({**_FP8, "fp8": "tensorwise", "fp8_output_proj": True}, 0.05),
    "tensorwise_input_store": ({**_FP8, "fp8": "tensorwise", "activation_func_fp8_input_store": True}, 0.05),
    "tensorwise_ends": (
        {**_FP8, "fp8": "tensorwise", "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1},
        0.03,
    ),
    "mxfp8": ({**_FP8, "fp8": "mxfp8"}, 0.03),
    "nvfp4": ({**_FP8, "fp8": "nvfp4"}, 0.1),
    "tensorwise_weights": ({**_FP8, "fp8": "tensorwise", "fp8_param_gather": True}, 0.03),
}
_VOCAB, _LENGTH, _ROWS, _RATE = 512, 512, 4, 2e-3


def model() -> ModelConfig:
    """Four layers with the head size of large models."""
    return ModelConfig(
        family="llama",
        num_layers=4,
        hidden_size=512,
        ffn_hidden_size=1536,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=128,
        vocab_size=_VOCAB,
        max_position_embeddings=_LENGTH,
    )


def chain(draw: torch.Generator, successors: Tensor) -> dict[str, Tensor]:
    """A micro-batch of the chain. Shapes: successors (V, 4)."""
    tokens = torch.empty(_ROWS, _LENGTH + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(_VOCAB, (_ROWS,), generator=draw)
    choice = torch.randint(4, (_ROWS, _LENGTH), generator=draw)
    for place in range(_LENGTH):
        tokens[:, place + 1] = successors[tokens[:, place], choice[:, place]]
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(_ROWS, _LENGTH),
        "position_ids": torch.arange(_LENGTH).expand(_ROWS, -1).contiguous(),
    }


def losses(precision: PrecisionConfig, data: list[dict[str, Tensor]]) -> list[float]:
    """Those of training on `data`, one batch a step, from the same weights."""
    run = RunConfig(
        model=model(),
        precision=precision,
        train=TrainConfig(
            steps=len(data), global_batch_size=_ROWS, micro_batch_size=_ROWS, seq_length=_LENGTH, eval_interval=0
        ),
        optim=OptimConfig(lr=_RATE),
    )
    with megatron.open_world(run.parallel, device="cuda") as world:
        return _steps(run, world, data)


def _steps(run: RunConfig, world: World, data: list[dict[str, Tensor]]) -> list[float]:
    models = megatron.build(run, world, None)
    ramp = [min(1.0, (number + 1) / 20) for number in range(len(data))]
    return [
        megatron.train_step(run, world, models, [batch], lr=_RATE * share).loss
        for batch, share in zip(data, ramp, strict=True)
    ]


def main() -> int:
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    steps, names = int(given.get("steps", 200)), given.get("only", "").split(",") if given.get("only") else [*FORMATS]
    draw = torch.Generator().manual_seed(0)
    successors = torch.randint(_VOCAB, (_VOCAB, 4), generator=draw)
    data = [chain(draw, successors) for _ in range(steps)]
    last, failed, reference = max(1, steps // 20), False, 0.0
    for name in dict.fromkeys(["fp32", *names]):
        fields, tolerance = FORMATS[name]
        before = time.perf_counter()
        try:
            found = losses(PrecisionConfig(**fields), data)  # type: ignore[arg-type]
        except MbfnError as error:
            print(f"{name:24s} refused: {error}", flush=True)
            continue
        except Exception as error:  # the other formats still tell something
            print(f"{name:24s} FAIL {type(error).__name__}: {str(error)[:600]}", flush=True)
            failed = True
            continue
        end = statistics.mean(found[-last:])
        reference = reference or end
        good = abs(end - reference) <= tolerance * reference and end < found[0] / 2
        failed = failed or not good
        took = time.perf_counter() - before
        record = {"format": name, "first": found[0], "end": end, "off": end / reference - 1, "tolerance": tolerance}
        with Path(given.get("out", "precisions.jsonl")).open("a") as file:
            file.write(json.dumps(record | {"steps": steps, "pass": good, "seconds": round(took, 1)}) + "\n")
        print(
            f"{name:24s} {'ok  ' if good else 'FAIL'} loss {found[0]:.4f} -> {end:.4f}, "
            f"{end / reference - 1:+.2%} of fp32's (at most {tolerance:.0%}), {took:.1f} s",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
