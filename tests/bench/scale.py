"""Memory of a conversion as the model grows, up to hundreds of gigabytes on a small disk.

    python -m tests.bench.scale [models=llama32_1b,llama31_8b,glm45_air] [dir=/tmp/mbfn-scale] [parallel=single]

The sources are sparse: safetensors files with whole headers whose data are holes. The sink discards: every byte is
read, laid out, given its CRC-32 and written, to /dev/null. Each model is converted in a process of its own. Nothing is
asserted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbfn.config.model import ModelConfig


def main() -> None:
    """One line a model."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    root = Path(options.get("dir", "/tmp/mbfn-scale"))
    parallel = options.get("parallel", "single")
    print(f"{'model':20}{'GB':>8}{'tensors':>9}{'plan s':>8}{'anon MB':>9}{'of it plan':>11}{'wall s':>8}{'GB/s':>7}")
    for name in options.get("models", "llama32_1b,llama31_8b,glm45_air").split(","):
        source = root / name
        shutil.rmtree(source, ignore_errors=True)
        make_sparse(name, source)
        figures = scale_of(source, parallel)
        print(
            f"{name:20}{figures['gb']:>8.1f}{figures['tensors']:>9}{figures['plan']:>8.1f}"
            f"{(figures['peak'] - figures['imports']) / 1e6:>9.0f}"
            f"{(figures['planned'] - figures['imports']) / 1e6:>11.0f}"
            f"{figures['wall']:>8.1f}{figures['gb'] / figures['wall']:>7.2f}",
            flush=True,
        )
        shutil.rmtree(source)


def make_sparse(name: str, target: Path) -> None:
    """The Hugging Face directory of a published size, its data holes, in files of 5 GB."""
    import torch

    import mbfn
    from mbfn.convert.table import table_of
    from mbfn.storage import Declared
    from mbfn.storage.headers import make_header
    from mbfn.storage.hf_shards import plan_shards

    model: ModelConfig = mbfn.compose(f"model={name}").model
    shapes = table_of(model, mbfn.ParallelConfig()).hf_shapes
    plan = [Declared(name=tensor, shape=shape, dtype=torch.bfloat16) for tensor, shape in shapes.items()]
    target.mkdir(parents=True)
    shards = plan_shards(plan, 5 << 30)
    for file, tensors in shards.items():
        header = make_header(((t.name, t.shape, t.dtype) for t in tensors), {"format": "pt"})
        (target / file).write_bytes(header)
        os.truncate(target / file, len(header) + sum(t.nbytes for t in tensors))
    weight_map = {t.name: file for file, tensors in shards.items() for t in tensors}
    if len(shards) > 1:
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (target / "config.json").write_text(json.dumps(mbfn.model_to_hf(model)))


def scale_of(source: Path, parallel: str) -> dict[str, float]:
    """The figures of one conversion in a fresh interpreter."""
    import subprocess

    code = f"from tests.bench.scale import *; child({str(source)!r}, {parallel!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{source}: {found.stderr}")
    figures: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return figures


def child(source: str, parallel: str) -> None:
    """Convert to nowhere, watching this process's anonymous memory."""
    import threading

    import mbfn
    from mbfn.storage.conversions import Care, plan_import
    from mbfn.storage.parts import write_part
    from mbfn.storage.streams import run_all
    from tests.bench.conversion import anonymous

    layout = mbfn.compose(f"parallel={parallel}", "train.global_batch_size=64").parallel
    imports = anonymous()
    peak, done = [imports], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    with plan_import(Path(source), layout, Care()) as conversion:
        planned, plan = anonymous(), time.perf_counter() - start
        null = os.open(os.devnull, os.O_WRONLY)
        start = time.perf_counter()
        run_all((partial(write_part, null, part) for file in conversion.package.files for part in file.parts), 2)
        wall = time.perf_counter() - start
        done.set()
        figures = {"plan": plan, "planned": planned, "imports": imports, "peak": peak[0], "wall": wall}
        print(json.dumps({**figures, "gb": conversion.nbytes / 1e9, "tensors": conversion.tensors}))


if __name__ == "__main__":
    main()
