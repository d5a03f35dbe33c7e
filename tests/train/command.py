"""`python -m mbfn.train` as a user runs it, on a model small enough for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=16",
    "model.vocab_size=512",
    "model.max_position_embeddings=128",
)
SHORT = (
    "train.seq_length=32",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.eval_interval=4",
    "train.eval_batches=1",
    "optim.lr=0.003",
    "log.sample_tokens=8",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
_TIMING = {"seconds", "data_s", "tokens_per_s", "tflops", "memory_gb"}


def start(output: Path, *overrides: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a run of `output`; data is tokenised once for all runs beside it."""
    fixed = (f"hydra.run.dir={output}", f"data.cache={output.parent / 'cache'}")
    command = [sys.executable, *prefix, "-m", "mbfn.train", *SHORT, *overrides, *fixed]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen[str], timeout: float = 150) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def train(output: Path, *overrides: str, prefix: tuple[str, ...] = ()) -> str:
    """Run to the end; what it printed."""
    code, out, err = finish(start(output, *overrides, prefix=prefix))
    assert code == 0, f"exit code {code}\n{out}\n{err}"
    return out


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """Return when the run has recorded `step`."""
    end = time.monotonic() + 120
    while not any(record["step"] >= step for record in records(output)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end, f"step {step} never came"
        time.sleep(0.01)


def records(output: Path) -> list[dict[str, Any]]:
    """The metrics so far, without what depends on the machine's speed."""
    path = output / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    rows = [json.loads(line) for line in complete.splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMING} for row in rows]


def losses(output: Path) -> list[float]:
    """The training loss of every step."""
    return [record["loss"] for record in records(output)]
