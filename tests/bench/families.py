"""Every family on one GPU: logits through Transformer Engine against transformers, and ten steps of falling loss.

    python -m tests.bench.families out=FILE.jsonl [only=llama,phi3] [limit=300] [device=cpu] [commit=HASH]
    python -m tests.bench.families render=FILE.jsonl[,FILE.jsonl]

The first takes the tiny models of the tests, their sizes doubled and rounded to what kernels take, and adds a line a
model to FILE: one of each family first, then the others. What fails is said in its line; a model whose class this
transformers lacks is skipped. `device=cpu` is a rehearsal in fp32 with Megatron's local modules. The second writes
families.json, from which tests/shown.py takes what was shown on a GPU.

A model is good where Megatron's weights have exactly the names that its rules give, logits are within `FP32` in fp32
and in bf16 within a multiple of what bf16 costs transformers itself, and the loss falls. With experts, a near tie that
rounding decides otherwise changes a token and those after it: there `SHARE` of the tokens must be within the bounds.
"""

from __future__ import annotations

import os

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine asks for TF32 in fp32 products, whatever torch is told
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # seconds a model, for calls of milliseconds

import gc
import importlib.metadata
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mbfn import megatron
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.convert import to_megatron
from mbfn.families import FAMILIES
from mbfn.megatron.settings import choose_impl
from tests.bench.lanes import ROOT, revision
from tests.bench.wider import scaled
from tests.convert.tiny_experts import EXPERTS
from tests.hybrids import HYBRIDS
from tests.megatron.dense import DENSE
from tests.megatron.mixtures import MIXTURES
from tests.megatron.tiny import SIZES, VARIANTS, config_of, randomised, rows, run_config, weights_of
from tests.mimo import MiMoConfig, MiMoForCausalLM
from tests.unusual import UNUSUAL, makers
from tests.vision import tiny as vision

RECORD = ROOT / "tests/bench/families.json"
FP32, SHARE, STEPS, CASE_S = 1e-3, 0.9, 10, 60
IN_FP32 = ("inv_freq", "correction_bias", "expert_bias")  # in transformers' bf16 models too

type Maker = Callable[[], PreTrainedModel]


def zoo() -> dict[str, Maker]:
    """The makers of the tests: one of each family, by its name, then the other models."""
    mimo: dict[str, Maker] = {"mimo": lambda: MiMoForCausalLM(MiMoConfig(**SIZES, num_nextn_predict_layers=1))}
    seeing: dict[str, Maker] = {name: partial(vision.hf_model, name) for name in vision.CONFIGS}
    unusual = makers(UNUSUAL, SIZES)
    known: dict[str, Maker] = {**EXPERTS, **mimo, **VARIANTS, **DENSE, **unusual, **MIXTURES, **HYBRIDS, **seeing}
    return {name: known[name] for name in FAMILIES} | known


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model of transformers, a batch, and what transformers makes of it."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    logits: Tensor
    own: float  # what bf16 changes in its own logits


def case_of(make: Maker, name: str, device: torch.device) -> Case:
    """The scaled model, every weight random, on the GPU."""
    made = randomised(lambda: scaled(make()))
    made.set_attn_implementation("eager")  # others leave out what they have no kernel for
    noise = torch.Generator().manual_seed(9)
    for of, buffer in made.named_buffers():
        if of.endswith("bias"):
            buffer.add_(torch.randn(buffer.shape, generator=noise) * 0.05)
    text, images = rows(0), dict[str, Tensor]()
    tokens, labels = text[:, :-1], text[:, 1:]
    if name in vision.CONFIGS:
        tokens, images = vision.pictures(name)
        labels = tokens.roll(-1, dims=1) % 100
    places = torch.arange(tokens.size(1)).expand_as(tokens)
    mask = (tokens != vision.IMAGE).float()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": places}
    model, weights = config_of(made), {of: weight.clone() for of, weight in weights_of(made).items()}
    made, given = made.to(device), {of: x.to(device) for of, x in images.items()}
    exact = _logits(made, tokens.to(device), given)
    for of, weight in (*made.named_parameters(), *made.named_buffers()):
        if weight.is_floating_point() and not of.endswith(IN_FP32):
            weight.data = weight.data.bfloat16()
    own = apart(_logits(made, tokens.to(device), given), exact).quantile(_share(model))
    return Case(model=model, weights=weights, batch=batch, images=images, logits=exact, own=float(own))


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """The largest difference at each token. Shapes: (B, S, V) -> (B * S,)"""
    return (found.to(wanted) - wanted).abs().amax(dim=-1).flatten()


def _share(model: ModelConfig) -> float:
    return SHARE if model.moe else 1.0


def _logits(made: PreTrainedModel, tokens: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    if images:
        dtype = next(made.parameters()).dtype
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in images.items()}
        return vision.reference_logits(made, tokens, given).float()
    with torch.no_grad():
        return made(tokens, use_cache=False).logits.float()


def measure(case: Case, world: megatron.World, params: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """Its logits in one number format, and its losses in the steps of it that are trained."""
    size, length = case.batch["tokens"].shape
    run = run_config(case.model, ParallelConfig(), PrecisionConfig(params=params))
    train = replace(run.train, global_batch_size=size, micro_batch_size=size, seq_length=length)
    run, impl = replace(run, train=train), choose_impl(world.device)
    models = megatron.build(run, world, to_megatron(case.weights, case.model, parallel=run.parallel, impl=impl))
    found = megatron.logits(world, models.chunks, case.batch["tokens"], case.images or None)
    differences = apart(found, case.logits)
    bound = FP32 if params == "fp32" else 2.5 * case.own + 1e-2
    share = float((differences < bound).float().mean())
    about = {"impl": impl, params: float(differences.max()), f"{params}_within": share, f"{params}_bound": bound}
    about["good"] = share >= _share(case.model)
    if params == "fp32" and world.device.type == "cuda":
        return about
    batch = {**case.batch, **case.images}
    losses = [megatron.train_step(run, world, models, [batch], lr=run.optim.lr).loss for _ in range(STEPS)]
    return {**about, "losses": [losses[0], losses[-1]], "trains": losses[-1] < losses[0] - 0.2}


def examine(name: str, make: Maker, world: megatron.World) -> dict[str, Any]:
    """The line of a model, whatever happens."""
    cpu, begun = world.device.type == "cpu", time.monotonic()
    record: dict[str, Any] = {"case": name, "family": name.split()[0], "good": True}
    with _told(record):
        case = case_of(make, name, world.device)
        record |= {"family": case.model.family, "transformers_bf16": case.own}
        formats: tuple[Literal["fp32", "bf16"], ...] = ("fp32",) if cpu else ("fp32", "bf16")
        for params in formats:
            with _told(record):
                found = measure(case, world, params)
                record |= {**found, "good": record["good"] and found["good"] and found.get("trains", True)}
    return record | {"seconds": round(time.monotonic() - begun, 2)}


@contextmanager
def _told(record: dict[str, Any]) -> Iterator[None]:
    """Put what is raised, as it is after `CASE_S`, into the record."""
    signal.alarm(CASE_S)
    try:
        yield
    except Exception as error:
        lacks = isinstance(error, AttributeError) and "transformers has no attribute" in str(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = frames[:1] + [frame for frame in frames if frame.filename.startswith((f"{ROOT}/mbfn", f"{ROOT}/tests"))]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (frames[-1], own[-1]))
        text = f"{type(error).__name__}: {str(error)[:300]} ({places})"
        key = "skipped" if lacks else "error"
        record |= {key: " | ".join([record[key], text] if key in record else [text]), "good": False}
    finally:
        signal.alarm(0)


def _late(*_: object) -> None:
    raise TimeoutError(f"no end after {CASE_S} s")


def run_all(out: Path, only: Sequence[str], *, cpu: bool, limit: float, commit: str) -> None:
    """A line for each model until it is time; after an error that ends CUDA's context, in a new process."""
    end, left = time.monotonic() + limit, [n for n in zoo() if not only or n in only or n.split()[0] in only]
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "versions": _versions()}
    signal.signal(signal.SIGALRM, _late)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about |= {"device": "cpu" if cpu else torch.cuda.get_device_name()}
    with megatron.open_world(ParallelConfig(), device="cpu" if cpu else "cuda", timeout_s=60) as world:
        while left and time.monotonic() < end:
            name = left.pop(0)
            record = examine(name, zoo()[name], world)
            with out.open("a") as file:
                file.write(json.dumps({**record, **about}) + "\n")
            verdict = "good" if record["good"] else "skip" if "skipped" in record else "BAD"
            print(verdict, json.dumps(record), flush=True)
            gc.collect()
            if left and "cuda error" in record.get("error", "").lower():
                line = [f"out={out}", f"only={','.join(left)}", f"limit={end - time.monotonic():.0f}"]
                os.execv(sys.executable, [sys.executable, "-m", "tests.bench.families", *line, f"commit={commit}"])
    if left:
        print(f"out of time, not run: {', '.join(left)}")


def render(names: Sequence[str]) -> None:
    """Families all of whose models were good on a GPU, beside those of earlier runs that these did not run."""
    lines = [json.loads(line) for name in names for line in Path(name).read_text().splitlines()]
    last = {line["case"]: line for line in lines if line["device"] != "cpu" and "skipped" not in line}
    kept = json.loads(RECORD.read_text())
    for family in FAMILIES:
        found = [line for line in last.values() if line["family"] == family]
        if found:
            kept.pop(family, None)
        if found and all(line["good"] and line["impl"] == "te" for line in found):
            worst = {of: float(f"{max(line[of] for line in found):.1e}") for of in ("fp32", "bf16")}
            kept[family] = {"date": max(line["date"] for line in found), **worst, "trains": True}
    ordered = {family: kept[family] for family in FAMILIES if family in kept}
    RECORD.write_text("{\n" + ",\n".join(f' "{n}": {json.dumps(of)}' for n, of in ordered.items()) + "\n}\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "megatron-core", "transformer-engine"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    transformers.logging.set_verbosity_error()
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    if "render" in given:
        return render(given["render"].split(","))
    only, cpu = [name for name in given.get("only", "").split(",") if name], given.get("device") == "cpu"
    out, limit = Path(given.get("out", "families.jsonl")), float(given.get("limit", 300))
    return run_all(out, only, cpu=cpu, limit=limit, commit=given.get("commit") or revision())


if __name__ == "__main__":
    main()
