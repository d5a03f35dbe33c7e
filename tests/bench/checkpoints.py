"""What saving costs a run, and how fast a checkpoint is written and read beside plain copies of its files.

    python -m tests.bench.checkpoints [hidden=768] [layers=8] [seq=128] [repeats=3] [dir=/tmp/mbfn-checkpoints]

One rank on this machine's CPU or GPU. Everything is measured in turns within one run, and the ratios are what counts.
Nothing is asserted.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mbfn import megatron
from mbfn.config.model import ModelConfig
from mbfn.config.optim import OptimConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import TrainConfig
from mbfn.storage import file_jobs

BUFFER = 8 << 20


def main() -> None:
    """One line a figure."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    root = Path(options.get("dir", "/tmp/mbfn-checkpoints"))
    repeats = int(options.get("repeats", 3))
    run = make_run(int(options.get("hidden", 768)), int(options.get("layers", 8)), int(options.get("seq", 128)))
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    torch.set_num_threads(1)
    with megatron.open_world(run.parallel, timeout_s=600) as world:
        models = megatron.build(run, world, None)
        measure(run, world, models, root, repeats)
    shutil.rmtree(root)


def make_run(hidden: int, layers: int, length: int) -> RunConfig:
    """A dense model; fp32 on the CPU, bf16 with fp32 states on a GPU."""
    model = ModelConfig(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 8 // 3 // 64 * 64,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        kv_channels=64,
        vocab_size=16384,
        max_position_embeddings=512,
    )
    train = TrainConfig(global_batch_size=4, micro_batch_size=1, seq_length=length, steps=1000)
    params = "bf16" if torch.cuda.is_available() else "fp32"
    return RunConfig(model=model, train=train, precision=PrecisionConfig(params=params), optim=OptimConfig(lr=1e-4))


def measure(run: RunConfig, world: megatron.World, models: megatron.Models, root: Path, repeats: int) -> None:
    """Print the figures."""
    step = stepper(run, world, models)
    saver = megatron.Saver(world)
    common: dict[str, Any] = {"step": 1}
    for _ in range(2):
        timed(step)
    place = root / "stopped"
    stopped = middle(repeats, lambda: megatron.save(place, run, world, models, common))
    nbytes = sum(file.stat().st_size for file in place.iterdir())
    beside = [stalls(step, saver, lambda: begin(saver, root, run, world, models)) for _ in range(repeats + 1)][1:]
    blocked, slower = (statistics.median(figures) for figures in zip(*beside, strict=True))
    copied = middle(repeats, lambda: copy_files(place, root / "copy"))
    read = middle(repeats, lambda: read_files(place))
    loaded = middle(repeats, lambda: megatron.load(place, run, world, models))
    checked = middle(repeats, lambda: [job() for job in file_jobs(place)])
    gb = nbytes / 1e9
    print(f"{run.model.num_parameters / 1e6:.0f} M parameters, checkpoint of {gb:.2f} GB, on {world.device.type}")
    print(f"save with training stopped   {stopped:8.3f} s   {gb / stopped:6.2f} GB/s")
    print(
        f"copy of its files            {copied:8.3f} s   {gb / copied:6.2f} GB/s   save / copy {stopped / copied:.2f}"
    )
    print(f"save beside steps: blocked   {blocked:8.3f} s   {blocked / stopped:.1%} of a save with training stopped")
    print(f"  steps slower by, in all    {slower:8.3f} s   {slower / stopped:.1%} (work that shares the processor)")
    print(f"load                         {loaded:8.3f} s   {gb / loaded:6.2f} GB/s")
    print(f"reading its files            {read:8.3f} s   {gb / read:6.2f} GB/s   load / read {loaded / read:.2f}")
    print(f"checking its digests         {checked:8.3f} s   {gb / checked:6.2f} GB/s")


def stepper(run: RunConfig, world: megatron.World, models: megatron.Models) -> Callable[[], None]:
    """An update, done when it returns."""
    size, length = run.train.micro_batch_size, run.train.seq_length
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(run.model.vocab_size, (run.num_microbatches, size, length + 1), generator=draw)
    batch = [
        {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "loss_mask": torch.ones(size, length),
            "position_ids": torch.arange(length).expand(size, length),
        }
        for part in tokens
    ]

    def step() -> None:
        megatron.train_step(run, world, models, batch, lr=run.optim.lr)
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def begin(saver: megatron.Saver, root: Path, run: RunConfig, world: megatron.World, models: megatron.Models) -> None:
    """Start a save beside the steps."""
    megatron.begin_save(saver, root / "beside", run, world, models, {"step": 1})


def stalls(step: Callable[[], None], saver: megatron.Saver, save: Callable[[], None]) -> tuple[float, float]:
    """Seconds that a save blocks training: its beginning and what the next update waits; and all that steps lose."""
    usual = statistics.median(timed(step) for _ in range(5))
    began = timed(save)
    waited = 0.0
    lost = began
    while saver.busy:
        before = saver.held_s
        lost += timed(step) - usual
        waited += saver.held_s - before
    if error := saver.finish():
        raise SystemExit(error)
    return began + waited, lost


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def middle(repeats: int, action: Callable[[], object]) -> float:
    """The median of its seconds."""
    return statistics.median(timed(action) for _ in range(repeats))


def copy_files(source: Path, target: Path) -> None:
    """Plain copies, on disk when it returns, as a save is."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as old, (target / file.name).open("wb") as new:
            shutil.copyfileobj(old, new, BUFFER)
            new.flush()
            os.fsync(new.fileno())


def read_files(source: Path) -> None:
    """Every byte through one buffer."""
    buffer = memoryview(bytearray(BUFFER))
    for file in source.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
