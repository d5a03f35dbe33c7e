"""Runs in forked ranks: `mbfn.train` from its job on, without the seconds of imports, to be killed at will."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mbfn.config.model import ModelConfig
from mbfn.config.optim import OptimConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import CheckpointConfig
from mbfn.storage import open_torch_dist
from mbfn.train.job import Job, run_job
from tests.data.runs import mock_run
from tests.ranks import RankError, run_ranks

MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=400,
    max_position_embeddings=128,
)


def session_run(
    parallel: ParallelConfig, *, steps: int, model: ModelConfig = MODEL, eval_interval: int = 0, **checkpoint: object
) -> RunConfig:
    """A run over random tokens that leaves checkpoints and nothing else."""
    plain = mock_run(steps=steps, eval_interval=eval_interval)
    saved = CheckpointConfig(**{"interval": 3, "keep_last": 2, "export_hf": False, **checkpoint})  # type: ignore[arg-type]
    log = replace(plain.log, progress=False, curve=False)
    optim = OptimConfig(lr=2e-3)
    return replace(plain, model=model, parallel=parallel, checkpoint=saved, log=log, optim=optim)


def go(run: RunConfig, output: Path, *, kill_at: int = 0, timeout_s: float = 120) -> list[tuple[int, bytes]]:
    """Exit code of each rank and its random numbers' state, of a run in `output`; with `kill_at` all die there."""
    size = run.parallel.world_size
    if not kill_at:
        return run_ranks(size, rank_of_run, run, output, timeout_s=timeout_s)
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(size, rank_of_run, run, output, kill_at, timeout_s=timeout_s)
    return []


def rank_of_run(run: RunConfig, output: Path, kill_at: int = 0) -> tuple[int, bytes]:
    """One rank. With `kill_at` it is killed after so many steps of this start, whatever it is at."""
    output.mkdir(parents=True, exist_ok=True)
    code = run_job(Job(run=run, output_dir=output), _killer(kill_at))
    return code, torch.get_rng_state().numpy().tobytes()


def _killer(kill_at: int) -> Callable[[], int]:
    steps = 0

    def stop() -> int:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    return stop


def same_checkpoints(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, objects and position, bit for bit."""
    with open_torch_dist(one) as a, open_torch_dist(other) as b:
        assert a.keys() == b.keys()
        assert a.common() == b.common()
        return all(torch.equal(a[key].view(-1).view(torch.uint8), b[key].view(-1).view(torch.uint8)) for key in a)
