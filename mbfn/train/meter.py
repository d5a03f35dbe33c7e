"""Speed and memory of a step, from its times and the configuration alone: nothing here waits for a device."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace

import torch

from mbfn.config.run import RunConfig
from mbfn.megatron import World
from mbfn.plan.flops import run_flops, step_tokens
from mbfn.train.state import Metrics

_GIB = 2.0**30


def make_meter(run: RunConfig, world: World) -> Callable[[Metrics], Metrics]:
    """Add tokens a second, TFLOP/s a GPU and peak memory to the metrics of a step that has its times.

    TFLOP/s: what the model's forward and backward passes cost for `global_batch_size * seq_length` tokens by
    `mbfn.plan.flops.run_flops` with causal attention, as Megatron counts, over the time of the update and its data,
    over the ranks. Recomputed activations do not count, nor do evaluations; padding does.
    """
    tokens = step_tokens(run)
    share = run_flops(run).causal * tokens / world.world_size / 1e12

    def meter(metrics: Metrics) -> Metrics:
        spent = metrics.data_s + metrics.update_s
        memory = peak_memory_gb(world.device)
        return replace(metrics, tokens_per_s=tokens / spent, tflops=share / spent, memory_gb=memory)

    return meter


def peak_memory_gb(device: torch.device) -> float:
    """GiB at the highest so far: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
