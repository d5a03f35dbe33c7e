"""mbfn beside a hand-written Megatron-core script with the same settings, in one call on the same GPUs.

    python tests/bench/gpu.py out=DIR [rows=8b_bf16,1b_bf16] [sides=mbfn,plain] [limit=480] [steps=4]
        [extra="KEY=VALUE" tag=x]

`rows` defaults to all that this machine has GPUs for. `8b_tensorwise+dpa+head` is a row with changes of mbfn's side,
and has no other. Both sides' lines go to DIR/bench.jsonl, the output of those that fail to DIR/failures.log; a table
with the ratios of step times follows. `extra` adds overrides to mbfn's side, whose rows `tag` then marks. No row starts
after `limit` seconds, and none outlives them by more than a minute. CUDA_VISIBLE_DEVICES picks the GPUs: calls on
different ones may run side by side and share DIR.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "")
_SCRATCH = Path("/tmp/mbfn_bench") / (_VISIBLE or "all")
_LOCK = str(_SCRATCH / "gpu.lock")
_ROW_LIMIT_S = 200
_LEAN = ("precision.grads=bf16", "precision.exp_avg=bf16", "precision.exp_avg_sq=bf16")
_OVERLAP = ("optim.overlap_grad_reduce=true", "optim.overlap_param_gather=true")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: overrides of mbfn's side, arguments of the other's."""

    name: str
    gpus: int = 1
    mbfn: tuple[str, ...]
    plain: tuple[str, ...]
    warmup: int = 2
    steps: int = 6
    alone: bool = False  # nothing to hold it against


def _row(name: str, shape: tuple[str, int, int, int], *mbfn: str, gpus: int = 1, plain: Sequence[str] = ()) -> Row:
    """A row on `shape`: model, tokens of a sequence, micro-batch, global batch. FP8 by the row's name."""
    model, seq, micro, batch = shape
    fp8 = next((recipe for recipe in ("tensorwise", "delayed", "blockwise") if recipe in name), "")
    history = ("precision.fp8_amax_history_len=16",) if fp8 == "delayed" else ()
    batches = (f"train.seq_length={seq}", f"train.micro_batch_size={micro}", f"train.global_batch_size={batch}")
    precision = f"precision=fp8_{fp8}" if fp8 else "precision=bf16"
    other = [f"shape={model}", f"seq={seq}", f"micro={micro}", f"batch={batch}", *plain]
    other += [f"fp8={fp8}"] if fp8 else []
    other += ["layers=8"] if model == "moe" else []
    return Row(
        name=name,
        gpus=gpus,
        mbfn=(*_MODELS[model], precision, *_LEAN, *history, *batches, *mbfn),
        plain=tuple(other),
        steps=10 if model == "1b" else 6,
    )


_MODELS = {
    "8b": ("model=llama31_8b",),
    "1b": ("model=llama32_1b",),
    "moe": ("model=qwen3_30b_a3b", "model.num_layers=8"),
}
_8B, _8B2, _8B4, _1B = ("8b", 8192, 1, 4), ("8b", 8192, 1, 8), ("8b", 8192, 1, 16), ("1b", 8192, 1, 8)
ROWS = (
    _row("8b_bf16", _8B),
    _row("8b_tensorwise", _8B),
    _row("8b_delayed", _8B),
    _row("8b_blockwise", _8B),
    _row("8b_lora", _8B, "peft=lora", plain=["lora=32"]),
    _row("8b_packed", _8B, "benchmark.packed_samples=8", plain=["packed=8"]),
    _row("1b_bf16", _1B),
    _row("1b_tensorwise", _1B),
    _row("moe_bf16", ("moe", 4096, 2, 8)),
    _row("8b_tp2_bf16", _8B2, "parallel=tp2", gpus=2, plain=["tp=2"]),
    _row("8b_tp2_tensorwise", _8B2, "parallel=tp2", gpus=2, plain=["tp=2"]),
    _row("8b_dp2_bf16", _8B2, "parallel=dp2", *_OVERLAP, gpus=2, plain=["overlap=true"]),
    _row("8b_lora_dp2", _8B2, "parallel=dp2", "peft=lora", *_OVERLAP, gpus=2, plain=["lora=32", "overlap=true"]),
    _row(
        "8b_packed_dp2",
        _8B2,
        "parallel=dp2",
        "benchmark.packed_samples=8",
        *_OVERLAP,
        gpus=2,
        plain=["packed=8", "overlap=true"],
    ),
    _row("8b_pp2_bf16", _8B2, "parallel=pp2", gpus=2, plain=["pp=2"]),
    _row("8b_pp2vpp2_bf16", _8B2, "parallel=pp2", "parallel.vpp=2", gpus=2, plain=["pp=2", "vpp=2"]),
    _row("8b_tp2dp2_bf16", _8B4, "parallel=tp2dp2", *_OVERLAP, gpus=4, plain=["tp=2", "overlap=true"]),
    _row("8b_tp4_bf16", _8B4, "parallel=tp4", gpus=4, plain=["tp=4"]),
)


# What a row may have more of, by the name that stands behind a +.
CHANGES = {
    "dpa": ("precision.fp8_attention=dot_product",),
    "head": ("precision.fp8_output_proj=true",),
    "weights": ("precision.fp8_param_gather=true",),
    "store": ("precision.activation_func_fp8_input_store=true",),
    "ends": ("precision.num_layers_at_start_in_bf16=1", "precision.num_layers_at_end_in_bf16=1"),
    "qkv": ("fusion.fused_single_qkv_rope=true",),
    "router": ("fusion.moe_router_fusion=true",),
    "graphs": ("train.cuda_graph_impl=local",),
    "partgraphs": ("train.cuda_graph_impl=local", "train.cuda_graph_modules=[attn,moe_router,moe_preprocess]"),
    "norms": ("train.recompute=selective", "train.recompute_modules=[layernorm]"),
    "mlp": ("train.recompute=selective", "train.recompute_modules=[mlp]"),
    "micro2": ("train.micro_batch_size=2",),
    "micro4": ("train.micro_batch_size=4",),
    "lora": ("peft=lora",),
    "packed": ("benchmark.packed_samples=8",),
}


def row_of(name: str) -> Row:
    """The row of this name, with the changes that it names."""
    known = {row.name: row for row in ROWS}
    base, *changes = name.split("+")
    more = [override for change in changes for override in CHANGES[change]]
    return replace(known[base], name=name, mbfn=(*known[base].mbfn, *more), alone=bool(changes))


@dataclass(slots=True, kw_only=True)
class Running:
    """A process of one side of a row."""

    row: Row
    side: str
    process: subprocess.Popen[bytes]
    started: float


def command(row: Row, side: str, out: Path, extra: Sequence[str]) -> list[str]:
    """What to start for `side`, one GPU behind the gate, several through the launcher."""
    one = row.gpus == 1
    if side == "mbfn":
        gate = (
            [str(ROOT / "tests/bench/gate.py"), _LOCK, "mbfn.megatron", "mbfn.train"] if one else ["-m", "mbfn.train"]
        )
        where = [f"hydra.run.dir={_SCRATCH / row.name}", *([] if one else ["launch=local"])]
        steps = [f"benchmark.warmup_steps={row.warmup}", f"benchmark.steps={row.steps}"]
        return [sys.executable, *gate, "bench=true", *row.mbfn, *steps, *where, *extra]
    script = str(ROOT / "tests/bench/megatron_script.py")
    gate = [str(ROOT / "tests/bench/gate.py"), _LOCK, "torch,transformer_engine.pytorch", script]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row.gpus), script]
    steps = [f"warmup={row.warmup}", f"steps={row.steps}", f"name={row.name}", f"out={out / 'bench.jsonl'}"]
    return [sys.executable, *(gate if one else several), *row.plain, *steps]


def start(row: Row, side: str, out: Path, extra: Sequence[str]) -> Running:
    """One side of a row as a process group of its own."""
    shutil.rmtree(_SCRATCH / row.name, ignore_errors=True) if side == "mbfn" else None
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8"),
    }
    with _log(row, side).open("wb") as log:
        process = subprocess.Popen(
            command(row, side, out, extra),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    return Running(row=row, side=side, process=process, started=time.monotonic())


def finish(done: Running, out: Path) -> None:
    """Keep mbfn's line with the row's name, and say how it went."""
    took, text = time.monotonic() - done.started, _log(done.row, done.side).read_text(errors="replace")
    made = _SCRATCH / done.row.name / "bench.jsonl"
    if done.side == "mbfn" and made.exists():
        record = {"name": done.row.name} | json.loads(made.read_text().splitlines()[-1])
        record["commit"] = record["commit"] or _revision()
        if done.row.gpus == 1:
            del record["startup_s"]  # it waited behind the gate for the row before
        with (out / "bench.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(f"{done.row.name} {done.side}: exit {done.process.returncode} after {took:.0f} s", flush=True)
    if done.process.returncode:
        print("\n".join(text.splitlines()[-12:])[-3000:], flush=True)
        with (out / "failures.log").open("a") as file:
            file.write(f"==== {done.row.name} {done.side}\n{text[-20000:]}\n")


def _revision() -> str | None:
    """What an archive of the repository says that it is of."""
    named = ROOT / "REVISION"
    return named.read_text().strip() if named.exists() else None


def _log(row: Row, side: str) -> Path:
    _SCRATCH.mkdir(parents=True, exist_ok=True)
    return _SCRATCH / f"{row.name}_{side}.log"


def run_all(work: Sequence[tuple[Row, str]], out: Path, limit: float, extra: Sequence[str]) -> None:
    """The sides one after the other; of those on one GPU the next one imports while this one measures."""
    begun, waiting, alive = time.monotonic(), list(work), list[Running]()
    while waiting or alive:
        while waiting and len(alive) < (2 if all(row.gpus == 1 for row, _ in waiting[:1]) else 1):
            if alive and alive[0].row.gpus > 1:
                break
            if time.monotonic() - begun > limit:
                print("out of time, not run:", ", ".join(f"{row.name} {side}" for row, side in waiting), flush=True)
                waiting = []
                break
            alive.append(start(*waiting.pop(0), out, extra))
            time.sleep(3)
        for running in list(alive):
            now = time.monotonic()
            late = now - running.started > _ROW_LIMIT_S or now - begun > limit + 60
            if late and running.process.poll() is None:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
            if running.process.poll() is not None:
                finish(running, out)
                alive.remove(running)
        time.sleep(0.1)


def ratios(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table: of each row both step times and their ratio."""
    last = {(line["name"], line["side"]): line for line in lines}
    yield f"{'row':20s} {'mbfn ms':>9s} {'plain ms':>9s} {'ratio':>6s} {'TFLOP/s':>8s} {'peak GiB':>8s} {'plain':>6s}"
    for name in dict.fromkeys(line["name"] for line in lines):
        ours, other = last.get((name, "mbfn")), last.get((name, "plain"))
        shown = [f"{side['step_ms']:9.1f}" if side else f"{'-':>9s}" for side in (ours, other)]
        ratio = f"{ours['step_ms'] / other['step_ms']:6.3f}" if ours and other else f"{'-':>6s}"
        rate = f"{ours['tflops_causal']:8.1f} {ours['peak_gib']:8.1f}" if ours else f"{'-':>8s} {'-':>8s}"
        yield f"{name:20s} {shown[0]} {shown[1]} {ratio} {rate} {other['peak_gib'] if other else 0:6.1f}"


def main() -> None:
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    out = Path(given.get("out", "bench_out"))
    out.mkdir(parents=True, exist_ok=True)
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    print(shown, end="", flush=True)
    gpus = len(_VISIBLE.split(",")) if _VISIBLE else len(shown.splitlines())
    sides = given.get("sides", "mbfn,plain").split(",")
    names = given.get("rows", "").split(",") if given.get("rows") else [row.name for row in ROWS if row.gpus == gpus]
    tag = given.get("tag", "")
    found = [row_of(name) for name in names]
    if given.get("steps"):
        found = [replace(row, steps=int(given["steps"])) for row in found]
    work = [(replace(row, name=row.name + tag), side) for row in found for side in sides[: 1 if row.alone else None]]
    run_all(work, out, float(given.get("limit", 480)), given.get("extra", "").split())
    path = out / "bench.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    print("\n".join(ratios(lines)), flush=True)


if __name__ == "__main__":
    main()
